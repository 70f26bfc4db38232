"""The program library over SQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from dspex_kernels import errors
from dspex_kernels.protocol.records import ProgramRecord
from dspex_kernels.sessions.store.library import (
    MAX_ALIASES,
    MAX_NAMES,
    MAX_TARGETS,
    MAX_VERSIONS,
    AliasTarget,
    LibraryEntry,
    LibraryPage,
    LibraryProgram,
    ProgramLibrary,
    check_alias,
    check_author,
    check_name,
)
from dspex_kernels.sessions.store.pages import check_limit
from dspex_kernels.sessions.store.rows import to_json, to_text
from dspex_kernels.sessions.store.schema import LIBRARY, SERIAL, TARGETS, VERSIONS
from dspex_kernels.sessions.store.turns import Turns


class SQLLibrary(ProgramLibrary):
    """Keeps the library in the store's database.

    Args:
        turns: The store's.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    async def publish(self, name: str, record: ProgramRecord, *, by: str) -> LibraryEntry:
        check_name(name)
        check_author(by)

        def publish(connection: sa.Connection) -> LibraryEntry:
            text = to_json(record)
            latest = _latest(connection, name)
            newest = _find_version(connection, name, latest)
            if newest is not None and newest.record == text:
                return _entry(newest)
            _check_room(connection, name)
            made = {"made_by": by, "made_at": to_text(datetime.now(UTC))}
            connection.execute(LIBRARY.update().where(LIBRARY.c.name == name).values(latest=latest + 1))
            row = {"name": name, "version": latest + 1, "record": text, **made}
            connection.execute(VERSIONS.insert(), row)
            _raise_serial(connection)
            return _read_entry(connection, name, latest + 1)

        return await self._turns.write(publish)

    async def point(self, name: str, alias: str, version: int, *, by: str) -> AliasTarget:
        check_alias(alias)
        check_author(by)

        def point(connection: sa.Connection) -> AliasTarget:
            if _find_version(connection, name, version) is None:
                raise _no_version(name, version)
            last = _last_move(connection, name, alias)
            if last is not None and last.version == version:
                return _target(connection, last)
            if last is None:
                _check_aliases(connection, name)
            return _move(connection, name, alias, last, version, last.move if last is not None else None, by)

        return await self._turns.write(point)

    async def roll_back(self, name: str, alias: str, *, by: str) -> AliasTarget:
        check_author(by)

        def roll_back(connection: sa.Connection) -> AliasTarget:
            last = _known_move(connection, name, alias)
            former = _find_move(connection, name, alias, last.former)
            if former is None:
                raise errors.VersionConflict(
                    f"alias {name}@{alias} has no target before version {last.version}, at least none of its last "
                    f"{MAX_TARGETS}: point it to a version",
                    details={"name": name, "alias": alias, "version": last.version},
                )
            # What was rolled back is not what the next roll-back leads to: that is what came before.
            return _move(connection, name, alias, last, former.version, former.former, by)

        return await self._turns.write(roll_back)

    async def library_entry(self, name: str, version: int) -> LibraryEntry:
        return await self._turns.read(lambda connection: _read_entry(connection, name, version))

    async def resolve(self, name: str, alias: str) -> AliasTarget:
        def resolve(connection: sa.Connection) -> AliasTarget:
            return _target(connection, _known_move(connection, name, alias))

        return await self._turns.read(resolve)

    async def library(self, *, limit: int = 100, after: str | None = None) -> LibraryPage:
        check_limit(limit)
        names = sa.select(VERSIONS.c.name).distinct().order_by(VERSIONS.c.name).limit(limit + 1)
        if after is not None:
            names = names.where(VERSIONS.c.name > after)

        def select(connection: sa.Connection) -> LibraryPage:
            found = connection.execute(names).scalars().all()
            shown = found[:limit]
            return LibraryPage(_programs(connection, shown), shown[-1] if len(found) > limit else None)

        return await self._turns.read(select)

    async def library_serial(self) -> int:
        return await self._turns.read(
            lambda connection: int(connection.execute(sa.select(SERIAL.c.serial)).scalar_one())
        )

    async def unpublish(self, name: str) -> None:
        def unpublish(connection: sa.Connection) -> None:
            connection.execute(TARGETS.delete().where(TARGETS.c.name == name))
            if connection.execute(VERSIONS.delete().where(VERSIONS.c.name == name)).rowcount == 0:
                raise errors.ProgramNotFound(
                    f"the library has no program {name!r}: library() tells which it has", details={"name": name}
                )
            _raise_serial(connection)

        await self._turns.write(unpublish)


def _latest(connection: sa.Connection, name: str) -> int:
    """The last version that was given under a name, which is made known if it is new."""
    query = sa.select(LIBRARY.c.latest).where(LIBRARY.c.name == name)
    latest = connection.execute(query).scalar_one_or_none()
    if latest is None:
        connection.execute(LIBRARY.insert(), {"name": name, "latest": 0})
    return latest or 0


def _check_room(connection: sa.Connection, name: str) -> None:
    versions = _count(connection, sa.select(VERSIONS.c.version).where(VERSIONS.c.name == name))
    if versions >= MAX_VERSIONS:
        raise errors.ProgramLimitReached(
            f"the library has {versions:,} versions of {name!r}, its limit: publish under another name, or "
            "unpublish this one",
            details={"name": name, "limit": MAX_VERSIONS},
        )
    names = 0 if versions else _count(connection, sa.select(VERSIONS.c.name).distinct())
    if names >= MAX_NAMES:
        raise errors.ProgramLimitReached(
            f"the library has {names:,} programs, its limit: unpublish one", details={"limit": MAX_NAMES}
        )


def _check_aliases(connection: sa.Connection, name: str) -> None:
    aliases = _count(connection, sa.select(TARGETS.c.alias).where(TARGETS.c.name == name).distinct())
    if aliases >= MAX_ALIASES:
        raise errors.ProgramLimitReached(
            f"the library has {aliases} aliases of {name!r}, its limit: point one of them",
            details={"name": name, "limit": MAX_ALIASES},
        )


def _count(connection: sa.Connection, query: sa.Select[Any]) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(query.subquery())).scalar_one())


def _find_version(connection: sa.Connection, name: str, version: int) -> Any | None:
    query = sa.select(VERSIONS).where(VERSIONS.c.name == name, VERSIONS.c.version == version)
    return connection.execute(query).first()


def _read_entry(connection: sa.Connection, name: str, version: int) -> LibraryEntry:
    row = _find_version(connection, name, version)
    if row is None:
        raise _no_version(name, version)
    return _entry(row)


def _entry(row: Any) -> LibraryEntry:
    record = ProgramRecord.model_validate_json(row.record)
    return LibraryEntry(row.name, row.version, record, row.made_by, datetime.fromisoformat(row.made_at))


def _last_move(connection: sa.Connection, name: str, alias: str) -> Any | None:
    of_alias = (TARGETS.c.name == name) & (TARGETS.c.alias == alias)
    return connection.execute(sa.select(TARGETS).where(of_alias).order_by(TARGETS.c.move.desc()).limit(1)).first()


def _known_move(connection: sa.Connection, name: str, alias: str) -> Any:
    last = _last_move(connection, name, alias)
    if last is None:
        raise errors.ProgramNotFound(
            f"the library has no {name}@{alias}: point the alias to a version first",
            details={"name": name, "alias": alias},
        )
    return last


def _find_move(connection: sa.Connection, name: str, alias: str, move: int | None) -> Any | None:
    same = (TARGETS.c.name == name) & (TARGETS.c.alias == alias) & (TARGETS.c.move == move)
    return connection.execute(sa.select(TARGETS).where(same)).first()


def _move(
    connection: sa.Connection, name: str, alias: str, last: Any | None, version: int, former: int | None, by: str
) -> AliasTarget:
    """Let the alias point to a version; ``former`` is the move that a roll-back repeats."""
    move = last.move + 1 if last is not None else 1
    row = {"name": name, "alias": alias, "move": move, "version": version, "former": former}
    connection.execute(TARGETS.insert(), {**row, "made_by": by, "made_at": to_text(datetime.now(UTC))})
    old = (TARGETS.c.name == name) & (TARGETS.c.alias == alias) & (TARGETS.c.move <= move - MAX_TARGETS)
    connection.execute(TARGETS.delete().where(old))
    _raise_serial(connection)
    return _target(connection, _known_move(connection, name, alias))


def _target(connection: sa.Connection, row: Any) -> AliasTarget:
    former = _find_move(connection, row.name, row.alias, row.former)
    previous = None if former is None else former.version
    made_at = datetime.fromisoformat(row.made_at)
    return AliasTarget(row.name, row.alias, row.version, previous, row.made_by, made_at)


def _programs(connection: sa.Connection, names: Any) -> tuple[LibraryProgram, ...]:
    versions: dict[str, list[int]] = {name: [] for name in names}
    aliases: dict[str, dict[str, int]] = {name: {} for name in names}
    kept = sa.select(VERSIONS.c.name, VERSIONS.c.version).where(VERSIONS.c.name.in_(names))
    for name, version in connection.execute(kept.order_by(VERSIONS.c.name, VERSIONS.c.version)):
        versions[name].append(version)
    moves = sa.select(TARGETS.c.name, TARGETS.c.alias, TARGETS.c.version).where(TARGETS.c.name.in_(names))
    for name, alias, version in connection.execute(moves.order_by(TARGETS.c.name, TARGETS.c.alias, TARGETS.c.move)):
        aliases[name][alias] = version  # the last move stands
    return tuple(LibraryProgram(name, tuple(versions[name]), aliases[name]) for name in names)


def _raise_serial(connection: sa.Connection) -> None:
    connection.execute(SERIAL.update().values(serial=SERIAL.c.serial + 1))


def _no_version(name: str, version: int) -> errors.ProgramNotFound:
    return errors.ProgramNotFound(
        f"the library has no version {version} of {name!r}: library() tells which it has",
        details={"name": name, "version": version},
    )
