from math import inf, nan

import pytest

from flipguard_onnx import OptionError, der

STARCODER_1B = 63.3, (14.8, 19.8, 26.5, 22.2)
PHI_2 = 99.47, (56.8, 41.4)


@pytest.mark.parametrize(
    ("baseline", "modified", "security", "utility", "printed"),
    [
        (STARCODER_1B, 0, 28.4, (17.3, 20.2, 24.9, 24.0), 0.49),
        (STARCODER_1B, 0.08, 62.7, (17.3, 23.3, 25.5, 24.5), 1.06),
        (STARCODER_1B, 0.10, 72.6, (17.4, 23.2, 25.5, 24.5), 1.07),
        (STARCODER_1B, 0.50, 93.3, (7.5, 14.1, 24.7, 22.0), 0.74),
        (PHI_2, 0.20, 98.2, (54.3, 51.9), 1.03),
    ],
)
def test_rows_of_the_paper(baseline, modified, security, utility, printed):
    assert round(der(security, utility, *baseline, modified), 2) == printed


def test_the_baseline_itself_has_1():
    assert der(0.9, [0.5, 0.7], 0.9, [0.5, 0.7], 0) == 1


def test_security_above_the_baseline_does_not_count_utility_does():
    assert der(1.0, [0.5], 0.8, [0.5], 0) == 1
    assert der(0.8, [0.55], 0.8, [0.5], 0) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"utility": ()}, "utility has 0 metrics; allowed: as many as baseline_utility, 1"),
        ({"utility": (0.5, 0.5)}, "utility has 2 metrics; allowed: as many as baseline_utility, 1"),
        ({"utility": (-0.5,)}, "utility is -0.5"),
        ({"utility": (nan,)}, "utility is nan"),
        ({"security": -0.1}, "security is -0.1"),
        ({"security": inf}, "security is inf"),
        ({"baseline_security": 0}, "baseline_security is 0; allowed: above 0"),
        ({"baseline_utility": (0.0,)}, "baseline_utility is 0.0; allowed: a mean above 0"),
        ({"modified": 8}, "modified is 8; allowed: 0 to 1"),
        ({"lam": -1}, "lam is -1"),
    ],
)
def test_out_of_range(change, message):
    fine = {
        "security": 0.9,
        "utility": (0.5,),
        "baseline_security": 0.9,
        "baseline_utility": (0.5,),
        "modified": 0.1,
    }
    with pytest.raises(OptionError, match=message):
        der(**fine | change)
