"""What a person in a notebook sees: the magics, how results are displayed, and the way from a cell to a command."""
