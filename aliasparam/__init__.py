"""aliasparam: quantized weights in one allocation, in the kernel's order, read and written under their checkpoint names.

See `docs/concepts.md` for the ideas and `aliasparam.declare` for where to start.
"""

from __future__ import annotations

from .layout import BoundLayout as BoundLayout
from .layout import Layout as Layout
from .module.declarations import Alias as Alias
from .module.declarations import Declaration as Declaration
from .module.declarations import Derivation as Derivation
from .module.declarations import Keep as Keep
from .module.declarations import Reencoding as Reencoding
from .module.expose import Exposure as Exposure
from .module.expose import expose_for_writing as expose_for_writing
from .module.registry import AliasRegistry as AliasRegistry
from .module.registry import registry_of as registry_of
from .module.verbs import accept_kernel_bytes as accept_kernel_bytes
from .module.verbs import checkpoint_names as checkpoint_names
from .module.verbs import checkpoint_state_dict as checkpoint_state_dict
from .module.verbs import declare as declare
from .module.verbs import invalidate as invalidate
from .module.verbs import iterate_checkpoint as iterate_checkpoint
from .module.verbs import process as process
from .module.verdict import Reason as Reason
from .ported import alias_or_bind_derived_param as alias_or_bind_derived_param
from .ported import copy_or_rebind_param as copy_or_rebind_param
from .reload import apply_delta as apply_delta
from .reload import checkpoint_digest as checkpoint_digest
from .reload import reload as reload
from .report.explain import Explanation as Explanation
from .report.explain import explain as explain
from .report.memory import MemoryReport as MemoryReport
from .report.memory import memory_report as memory_report
from .spec import TensorSpec as TensorSpec
from .storage.states import State as State
from .storage.storage import AliasedStorage as AliasedStorage
from .tensors.parameter import AliasedParameter as AliasedParameter

__version__ = "0.3.0.dev0"
