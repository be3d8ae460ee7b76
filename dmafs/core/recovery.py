"""Recovery: what may be found when a volume is opened, and what is done then. Every case has a label.

Each table says under what conditions a row is the one that counts; ``-`` is any. Exactly one row of a table fits what
is found. ``case`` logs the labels as they are met, at level debug.

*claimed* is the seq up to which something says that the journal was durable: the pointers, a record, a seal. *Refused*
means that the volume isn't opened, and that no file is changed: whatever is refused is refused each time.

Names in ``forward/``, ``file_case``::

    row  ours  ext  what is done
    R1   no    -    refused: it is somebody else's
    R2   yes   no   data without descriptors: unlinked, unless a segment is damaged, whose data it may be
    R3   yes   yes  a segment

Segments, in the order of their seqs, ``segment_case``. *needed*: no later one begins at or before the first event
behind the tail. *header*: blank is too short or all zeros, or stands alone, without records and without a data file;
records without a data file make it damaged, too. *follows*: it begins where the one before ends, the first
one at or before the event behind the tail. *later*: it isn't the last one. *sealed*: it has a valid seal. *whole*: its
records and data reach the next segment. *durable*: how much is claimed of what is missing here (with a header that
isn't good all of it, if it doesn't follow what is before it): none, some, or all up to the next segment or the end::

    row  needed  header   follows  later  sealed  whole  durable  what is done
    R4   no      -        -        -      -       -      -        in the mirror: unlinked
    R5   yes     blank    -        -      -       -      none     the journal ends before it: unlinked
    R6   yes     damaged  -        -      -       -      none     refused: it had been written
    R7   yes     bad      yes      yes    -       -      all      damaged: who needs it gets the error
    R8   yes     bad      no       yes    -       -      all      refused
    R9   yes     bad      -        no     -       -      all      refused
    R10  yes     bad      -        -      -       -      some     refused
    R11  yes     good     no       -      -       -      none     behind a torn end or a lost name: unlinked
    R12  yes     good     no       -      -       -      lost     refused: what is before it is missing
    R13  yes     good     yes      yes    yes     -      -        known by its seal, its descriptors aren't read
    R14  yes     good     yes      yes    no      yes    -        read, and sealed with the next flush
    R15  yes     good     yes      yes    no      no     all      damaged: who needs it gets the error
    R16  yes     good     yes      yes    no      no     some     refused
    R17  yes     good     yes      yes    no      no     none     the torn end: read, what is behind it doesn't follow
    R18  yes     good     yes      no     -       -      none     the end: read
    R19  yes     good     yes      no     -       -      lost     refused

(*bad* is blank or damaged, *lost* is some or all.)

Then the end of what counts, ``end_case``. *ends*: before what is claimed, or there; or all of it behind a tail that
nothing is claimed behind. *last*: the last segment that counts; damaged also if that one is which has the last place in
the log. *windowed*: the events come from a log::

    row  ends    last     windowed  what is done
    R20  before  -        -         refused
    R21  behind  -        yes       refused: the place in the log is unknown
    R22  behind  -        no        all segments unlinked: a release was cut off
    R23  there   none     -         empty
    R24  there   open     -         goes on where it ends; what is behind it in the files is cut off
    R25  there   sealed   -         its successor had nothing in it: read, the seal is cut off, goes on
    R26  there   damaged  -         refused

And what had not been durable behind *claimed*, ``tail_case``. *torn*: some data there isn't what its checksum says.
*unclosed*: there are events behind the last indicator::

    row  torn  windowed  unclosed  what is done
    R27  yes   -         -         cut off from there on, then as below
    R28  no    yes       yes       cut off behind the indicator: that window is read from the log again
    R29  no    yes       no        nothing
    R30  no    no        -         nothing

Names in ``backward/``, ``snapshot_case``. *beside*: for data descriptors, for a pin a snapshot that users see::

    row  suffix   beside  what is done
    R31  ext      -       a snapshot; a temporary one is dropped, unless a clone is made of it
    R32  gone     -       its drop is finished, unless a clone is made of it
    R33  new      -       half made: unlinked
    R34  dat      yes     its data
    R35  dat      no      left over: unlinked
    R36  pin      yes     that snapshot is pinned
    R37  pin      no      means nothing: unlinked
    R38  foreign  -       refused: it is somebody else's

Entries of a snapshot are read when they are needed, ``entries_case``. *readable*: how many are, of those that the
header calls durable::

    row  readable  what is done
    R39  fewer     damaged: who needs it gets the error
    R40  all       what is behind them and can't be read is cut off before anything is appended

Pointers, ``pointers_case``. *slots*: valid ones. *snapshot*: the open one that they name. *target*: a sync had been
committed::

    row  slots  snapshot  target  what is done
    R41  none   -         -       refused
    R42  some   missing   -       refused: moments before the mirror need it
    R43  some   whole     yes     the mirror is overwritten again, then the pointers advance
    R44  some   whole     no      nothing: what a sync that wasn't committed has saved is true

(*whole* is there, or none is named.) Last, by the daemon, ``stop_case``, once events behind what is durable are on the
primary again. *kernel*: the one that the volume was opened under. *gap*: one lasts. *copied*: so is the primary::

    row  clean  kernel  gap  copied  what is done
    R45  yes    -       -    -       nothing
    R46  no     same    -    -       nothing: the page cache has kept what was written
    R47  no     other   yes  -       the resync begins anew
    R48  no     other   no   yes     a gap begins, and a resync
    R49  no     other   no   no      the initial copy begins anew

An index, in ``forward/`` or ``backward/``, is of use or not, which is seen when it is needed, ``index_case``. *beside*:
the descriptors that it is named after::

    row  beside  what is done
    R50  yes     nothing
    R51  no      left over: unlinked
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, NoReturn

from dmafs.errors import StoreError

log = logging.getLogger(__name__)

DIRECTORY: Final = "forward"
STEM_DIGITS: Final = 20  # of 2**64 - 1, so that names sort as seqs do

Header = Literal["blank", "damaged", "good"]
Durable = Literal["none", "some", "all"]
Refuse = Callable[[str, StoreError], None]
"""Is told which file of the volume is refused and why, and raises the error, unless all that is wrong is wanted."""
Suffix = Literal["ext", "gone", "new", "dat", "pin", "foreign"]
SUFFIXES: Final = ("ext", "gone", "new", "dat", "pin")
"""Of files in ``backward/``."""

REFUSED: Final = frozenset(
    {"R1", "R6", "R8", "R9", "R10", "R12", "R16", "R19", "R20", "R21", "R26", "R38", "R41", "R42"}
)
"""The rows that say so."""
PASSED_OVER: Final = ("a segment before it is missing", "refused")
"""What a part is said to be damaged by that was refused, where somebody wants to know of all that is."""


def stem(first: int) -> str:
    """Return the name, without suffix, of the segment that begins with seq *first*."""
    return f"{DIRECTORY}/{first:0{STEM_DIGITS}d}"


def case(label: str, what: str) -> str:
    """Log that a row counts for something, and return its label."""
    log.debug("recovery %s: %s", label, what)
    return label


def refuse(_name: str, error: StoreError) -> NoReturn:
    """Raise *error*: what is refused isn't opened."""
    raise error


class FoundSegment(NamedTuple):
    """The conditions of the table of segments."""

    needed: bool
    header: Header
    follows: bool
    later: bool
    sealed: bool
    whole: bool
    durable: Durable


def file_case(*, ours: bool, ext: bool) -> str:
    """Return the row for a name in ``forward/``."""
    return ("R3" if ext else "R2") if ours else "R1"


def segment_case(found: FoundSegment) -> str:
    """Return the row for a segment."""
    if not found.needed:
        return "R4"
    if found.header != "good":
        return _unreadable_case(found)
    if not found.follows:
        return "R11" if found.durable == "none" else "R12"
    if not found.later:
        return "R18" if found.durable == "none" else "R19"
    if found.sealed or found.whole:
        return "R13" if found.sealed else "R14"
    return {"all": "R15", "some": "R16", "none": "R17"}[found.durable]


def _unreadable_case(found: FoundSegment) -> str:
    if found.durable == "none":
        return "R5" if found.header == "blank" else "R6"
    if found.durable == "some":
        return "R10"
    if not found.later:
        return "R9"
    return "R7" if found.follows else "R8"


def end_case(
    *,
    ends: Literal["before", "behind", "there"],
    last: Literal["none", "open", "sealed", "damaged"],
    windowed: bool,
) -> str:
    """Return the row for the end of what counts."""
    if ends == "before":
        return "R20"
    if ends == "behind":
        return "R21" if windowed else "R22"
    return {"none": "R23", "open": "R24", "sealed": "R25", "damaged": "R26"}[last]


def tail_case(*, torn: bool, windowed: bool, unclosed: bool) -> str:
    """Return the row for what had not been durable."""
    if torn:
        return "R27"
    return ("R28" if unclosed else "R29") if windowed else "R30"


def snapshot_case(*, suffix: Suffix, beside: bool) -> str:
    """Return the row for a name in ``backward/``."""
    if suffix == "dat":
        return "R34" if beside else "R35"
    if suffix == "pin":
        return "R36" if beside else "R37"
    return {"ext": "R31", "gone": "R32", "new": "R33", "foreign": "R38"}[suffix]


def entries_case(*, readable: Literal["fewer", "all"]) -> str:
    """Return the row for the entries of a snapshot."""
    return "R39" if readable == "fewer" else "R40"


def pointers_case(*, slots: Literal["none", "some"], snapshot: Literal["missing", "whole"], target: bool) -> str:
    """Return the row for the pointers."""
    if slots == "none":
        return "R41"
    if snapshot == "missing":
        return "R42"
    return "R43" if target else "R44"


def index_case(*, beside: bool) -> str:
    """Return the row for an index."""
    return "R50" if beside else "R51"


def stop_case(*, clean: bool, kernel: Literal["same", "other"], gap: bool, copied: bool) -> str:
    """Return the row for how the volume was left."""
    if clean:
        return "R45"
    if kernel == "same":
        return "R46"
    if gap:
        return "R47"
    return "R48" if copied else "R49"
