"""Sampling parameters that a program, a call or an LM profile may set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """The parameters, with their types and ranges."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, le=10)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    stop: str | list[str] | None = Field(None, max_length=1000)
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-10, le=10)
    frequency_penalty: float | None = Field(None, ge=-10, le=10)
    repetition_penalty: float | None = Field(None, ge=0, le=10)
    logprobs: bool | int | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100)
    logit_bias: dict[str, float] | None = None
    reasoning_effort: str | None = Field(None, max_length=32)
    verbosity: str | None = Field(None, max_length=32)
