"""Reductions and scans."""

from __future__ import annotations

from gemskit.reduce.extrema import amax as amax
from gemskit.reduce.extrema import amin as amin
from gemskit.reduce.extrema import argmax as argmax
from gemskit.reduce.extrema import argmin as argmin
from gemskit.reduce.extrema import max as max
from gemskit.reduce.extrema import min as min
from gemskit.reduce.scans import cumsum as cumsum
from gemskit.reduce.scans import cumsum_ as cumsum_
from gemskit.reduce.statistics import var as var
from gemskit.reduce.sums import mean as mean
from gemskit.reduce.sums import sum as sum
