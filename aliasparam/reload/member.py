"""One rank's models, such as a target and its draft, as one member of :class:`~aliasparam.reload.ranks_store.Ranks`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from ..errors import ReloadError
from .session import Phase, ReloadSession

#: Makes a session that is prepared while the old weights serve (policy "staged-journal", or ``prepare_delta``), and says what
#: it is about to serve: one text on all ranks.
Prepare = Callable[[], tuple[ReloadSession, str]]


class SessionMember:
    """Sessions that commit together, or not at all.

    The old weights serve until ``commit``; from then on nothing serves until ``keep`` or ``revert``.

    Args:
        prepare: one for each model, called in order.
    """

    def __init__(self, *prepare: Prepare) -> None:
        self._prepare: Sequence[Prepare] = prepare
        self.sessions: list[ReloadSession] = []

    def prepare(self) -> str:
        """
        Raises:
            ReloadError: a session could not take its commit back, or is not prepared. What was prepared is aborted.
        """
        over = Phase.COMMITTED, Phase.ENDED
        self.sessions = [session for session in self.sessions if session.phase not in over]  # of changes before
        said = []
        try:
            for prepare in self._prepare:
                session, token = prepare()
                self.sessions.append(session)
                said.append(token)
                _need_recoverable(session)
        except BaseException:
            self.revert()
            raise
        return hashlib.sha256("\0".join(said).encode()).hexdigest()

    def commit(self) -> None:
        """Every model has its new weights, and refuses."""
        for session in self.sessions:
            session.switch()

    def keep(self) -> None:
        """Every model serves its new weights. May be called again."""
        for session in self.sessions:
            if session.phase is not Phase.ENDED:
                session.commit()

    def revert(self) -> None:
        """Every model serves its old weights; the others are brought back also where one cannot be. May be called again.

        Raises:
            AliasError: the first that could not be; it refuses.
        """
        errors = []
        for session in reversed(self.sessions):
            try:
                session.abort()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def _need_recoverable(session: ReloadSession) -> None:
    if session.phase is not Phase.PREPARED or session.observed.policy not in ("staged-journal", "delta"):
        raise ReloadError(
            "the ranks need sessions that are prepared and can be taken back",
            module=type(session.model).__name__,
            expected='a prepared session with policy="staged-journal", or one of prepare_delta',
            found=f"policy {session.observed.policy!r}, {session.phase.value}",
        )
