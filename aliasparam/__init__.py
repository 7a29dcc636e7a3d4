"""aliasparam: one allocation, two formats, every name right.

See `docs/concepts.md` for the ideas and `aliasparam.declare` for where to start.
"""

from __future__ import annotations

from ._bulk import bulk_load as bulk_load
from ._declare import Alias as Alias
from ._declare import Declaration as Declaration
from ._declare import Derivation as Derivation
from ._declare import Keep as Keep
from ._expose import Exposure as Exposure
from ._expose import expose_for_writing as expose_for_writing
from ._parameter import AliasedParameter as AliasedParameter
from ._permute import DeinterleaveHalves as DeinterleaveHalves
from ._permute import InterleaveHalves as InterleaveHalves
from ._permute import PermuteRows as PermuteRows
from ._permute import SwapHalves as SwapHalves
from ._ported import alias_or_bind_derived_param as alias_or_bind_derived_param
from ._ported import copy_or_rebind_param as copy_or_rebind_param
from ._probe import check_inverse as check_inverse
from ._registry import AliasRegistry as AliasRegistry
from ._registry import declare as declare
from ._registry import registry_of as registry_of
from ._reload import reload as reload
from ._report import MemoryReport as MemoryReport
from ._report import explain as explain
from ._report import memory_report as memory_report
from ._storage import AliasedStorage as AliasedStorage
from ._storage import State as State
from ._transform import Band as Band
from ._transform import Chain as Chain
from ._transform import Identity as Identity
from ._transform import PadLast2 as PadLast2
from ._transform import TensorSpec as TensorSpec
from ._transform import Transform as Transform
from ._transform import ViewDtype as ViewDtype
from ._verbs import checkpoint_names as checkpoint_names
from ._verbs import checkpoint_state_dict as checkpoint_state_dict
from ._verbs import invalidate as invalidate
from ._verbs import iterate_checkpoint as iterate_checkpoint
from ._verbs import process as process
from ._verbs import restore as restore
from ._verdict import Reason as Reason

__version__ = "0.1.0"
