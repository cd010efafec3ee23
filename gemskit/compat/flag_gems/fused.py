"""``flag_gems.fused``: operators that join several, under FlagGems' names."""

from gemskit.compat.flag_gems import _signatures, _table


def _fuses(name: str) -> bool:
    return name in _signatures.FUSED or name not in _signatures.parameters()


__getattr__, __dir__ = _table.attributes(globals(), _fuses)
