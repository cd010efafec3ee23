"""``flag_gems.ops``: the operators that are not in `fused`, under FlagGems' names."""

from gemskit.compat.flag_gems import _signatures, _table

__getattr__, __dir__ = _table.attributes(globals(), lambda name: name not in _signatures.FUSED)
