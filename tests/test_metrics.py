"The shared metrics: closed forms, reference formulas, shared resamples, two-level differences, bad input."
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
from torchmetrics.functional.regression import pearson_corrcoef  # noqa: F401

