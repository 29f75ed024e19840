"""Every reply of a judge, kept as it arrives and found again by the content of its request.

One SQLite file in WAL mode, which several processes may share on one machine; not on a network file system, where
SQLite's locks do not hold. What is stored: the raw reply, tokens, seconds, the judge with its parameters, the time,
and the parsed verdict once a caller notes it. Keys of an API never come here.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from echo4o_hf.judges.judge import Reply

_APPLICATION_ID = 0x4563686F  # "Echo"
_VERSION = 1
_BUSY_SECONDS = 60.0
_TABLE = """
CREATE TABLE replies (
    key TEXT PRIMARY KEY, reply TEXT NOT NULL, truncated INTEGER NOT NULL,
    input_tokens INTEGER, output_tokens INTEGER, latency REAL,
    judge TEXT NOT NULL, parameters TEXT NOT NULL, created TEXT NOT NULL, verdict TEXT
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class StoredReply:
    """One row of the store.

    `parameters` are the judge's, `created` is ISO 8601 in UTC, `verdict` what the caller noted (JSON), or None.
    """

    reply: Reply
    judge: str
    parameters: dict[str, Any]
    created: str
    verdict: Any


def request_key(
    system: str,
    prompt: str,
    image_bytes: Sequence[bytes],
    judge_name: str,
    judge_parameters: Mapping[str, Any],
    repeat: int,
) -> str:
    """SHA-256 of all that decides a reply, each part preceded by its length, so that no two requests run together."""
    parameters = json.dumps(judge_parameters, sort_keys=True, ensure_ascii=False, allow_nan=False)
    texts = ("echo4o request 1", judge_name, parameters, str(repeat), system, prompt)
    digest = hashlib.sha256()
    for part in (*(text.encode("utf-8", "surrogatepass") for text in texts), *image_bytes):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


class VerdictStore:
    """Replies by `request_key`, in an SQLite file; safe with threads and with other processes.

    Args:
        path: Made where it does not exist, with its folder.

    Raises:
        OSError: the file cannot be opened, and likewise later: it cannot be read or written, such as on a full disk.
        ValueError: the file is something else than a store of this version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot open the store {str(self.path)!r}: {error}") from error
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self._connection.close()
            raise OSError(f"cannot write to the store {str(self.path)!r}: {error}") from error
        except (sqlite3.DatabaseError, ValueError) as error:
            self._connection.close()
            raise ValueError(f"{str(self.path)!r} is not a store of replies: {error}") from error

    def _prepare(self) -> None:
        # Two processes that make the same store: switching to WAL does not wait for the other, unlike all the rest.
        deadline = time.monotonic() + _BUSY_SECONDS
        self._check_owner()
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        # In WAL mode a killed process loses nothing with this; a machine without power may lose the latest replies.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with _Transaction(self._connection):
            if self._check_owner() == 0:
                self._connection.execute(_TABLE)
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _check_owner(self) -> int:
        """The version of the store in the file; 0 in an empty file."""
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version) != (_APPLICATION_ID, _VERSION) and (application, version, tables) != (0, 0, 0):
            raise ValueError(f"an SQLite file with application_id {application}, user_version {version}")
        return int(version)

    def get(self, key: str) -> StoredReply | None:
        """What is stored under `key`."""
        with self._use():
            return self._get(key)

    def put(self, key: str, reply: str, *, judge: str, parameters: Mapping[str, Any]) -> StoredReply:
        """Store a reply in a transaction of its own, and return what is stored under `key` from now on.

        That is an earlier reply where there is one: of another process that asked the same at the same time.
        """
        known = reply if isinstance(reply, Reply) else Reply(reply)
        row = (key, str(known), known.truncated, known.input_tokens, known.output_tokens, known.latency)
        origin = (judge, json.dumps(parameters, sort_keys=True), datetime.now(UTC).isoformat(timespec="milliseconds"))
        with self._use():
            self._connection.execute(
                "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT (key) DO NOTHING",
                (*row, *origin),
            )
            stored = self._get(key)
        assert stored is not None
        return stored

    def put_verdicts(self, verdicts: Mapping[str, Any]) -> None:
        """Note the parsed verdict (JSON) beside each reply; keys that are not stored are passed over."""
        rows = [(json.dumps(verdict, sort_keys=True), key) for key, verdict in verdicts.items()]
        with self._use(), _Transaction(self._connection):
            self._connection.executemany("UPDATE replies SET verdict = ? WHERE key = ?", rows)

    def __len__(self) -> int:
        with self._use():
            (count,) = self._connection.execute("SELECT count(*) FROM replies").fetchone()
        return int(count)

    def close(self) -> None:
        """Close the file; a later call raises `sqlite3.ProgrammingError`."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        """One thread at a time; what SQLite cannot do is an error of the file."""
        with self._lock:
            try:
                yield
            except sqlite3.ProgrammingError:
                raise
            except sqlite3.DatabaseError as error:
                raise OSError(f"cannot use the store {str(self.path)!r}: {error}") from error

    def _get(self, key: str) -> StoredReply | None:
        columns = "reply, truncated, input_tokens, output_tokens, latency, judge, parameters, created, verdict"
        with closing(self._connection.execute(f"SELECT {columns} FROM replies WHERE key = ?", (key,))) as rows:
            row = rows.fetchone()
        if row is None:
            return None
        text, truncated, input_tokens, output_tokens, latency, judge, parameters, created, verdict = row
        reply = Reply(
            text,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            latency=latency,
            truncated=bool(truncated),
        )
        return StoredReply(reply, judge, json.loads(parameters), created, verdict and json.loads(verdict))


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK where an exception passes: the write lock is held from the first read."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.connection.execute("COMMIT")
        else:
            with suppress(sqlite3.OperationalError):  # SQLite has rolled back by itself
                self.connection.execute("ROLLBACK")
