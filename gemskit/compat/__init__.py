"""Optional adapters onto other libraries' names."""

from gemskit.compat.aten import disable_aten as disable_aten
from gemskit.compat.aten import enable_aten as enable_aten
from gemskit.compat.aten import no_aten as no_aten
from gemskit.compat.aten import registered_keys as registered_keys
from gemskit.compat.aten import registered_ops as registered_ops
from gemskit.compat.aten import use_aten as use_aten
