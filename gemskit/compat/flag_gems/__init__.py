"""FlagGems' public names on top of gemskit: ``from gemskit.compat import flag_gems``.

Operators have the names, the argument order and the defaults of FlagGems 5.0.2, whichever gemskit operator serves them; see
``docs/compat-flaggems.md`` for what differs. Only `enable` and its kin change anything in torch.
"""

from gemskit.backends import device as device
from gemskit.compat.flag_gems import _table
from gemskit.compat.flag_gems._control import all_registered_keys as all_registered_keys
from gemskit.compat.flag_gems._control import all_registered_ops as all_registered_ops
from gemskit.compat.flag_gems._control import disable as disable
from gemskit.compat.flag_gems._control import enable as enable
from gemskit.compat.flag_gems._control import no_gems as no_gems
from gemskit.compat.flag_gems._control import only_enable as only_enable
from gemskit.compat.flag_gems._control import set_backend as set_backend
from gemskit.compat.flag_gems._control import use_backend as use_backend
from gemskit.compat.flag_gems._control import use_gems as use_gems
from gemskit.compat.flag_gems._control import vendor_name as vendor_name
from gemskit.compat.flag_gems.modules import GemsDeepseekYarnRoPE as GemsDeepseekYarnRoPE
from gemskit.compat.flag_gems.modules import GemsRMSNorm as GemsRMSNorm
from gemskit.compat.flag_gems.modules import GemsRope as GemsRope
from gemskit.compat.flag_gems.modules import GemsSiluAndMul as GemsSiluAndMul

# Last, and nothing after them: operators called `all` or `sum` become names of this module when they are first used.
from gemskit.compat.flag_gems import fused as fused  # isort: skip
from gemskit.compat.flag_gems import ops as ops  # isort: skip

__getattr__, __dir__ = _table.attributes(globals(), lambda name: True)
