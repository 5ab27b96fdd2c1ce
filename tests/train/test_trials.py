"""The probabilistic and the deflated Sharpe ratio, the clusters of trials, and the trials that a ledger tells of."""

import datetime
import math
import pathlib
import statistics

import numpy as np
import pytest

import train
from perpjax.data.ledger import Ledger
from train.evaluate.trials import (
    LEAST_DAYS,
    correlate,
    count_clusters,
    deflated_sharpe,
    expected_maximum_sharpe,
    judge_trials,
    probabilistic_sharpe,
    probabilistic_sharpe_of,
    sharpe_of_days,
)

DAY_MS = 86_400_000
FIRST_DAY = datetime.date(2025, 1, 1)
START_MS = int(datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC).timestamp()) * 1000


def skewed(days: int = 250, seed: int = 0) -> np.ndarray:
    return 0.02 * np.random.default_rng(seed).gumbel(size=days) - 0.008


# The formulas.


def test_the_published_example():
    """Bailey and Lopez de Prado, "The Deflated Sharpe Ratio" (2014): 100 trials, 1 250 days, 0.9004."""
    benchmark = expected_maximum_sharpe(100, 0.5 / 250)
    assert benchmark == pytest.approx(0.1132, abs=5e-5)
    ratio = 2.5 / math.sqrt(250)
    assert probabilistic_sharpe_of(ratio, 1250, skew=-3, kurtosis=10, benchmark=benchmark) == pytest.approx(
        0.9004, abs=5e-5
    )
    # Their second finding: with 46 trials the same strategy is significant at 95 %, with normal returns with 88.
    for trials, moments in ((46, (-3, 10)), (88, (0, 3))):
        found = [probabilistic_sharpe_of(ratio, 1250, *moments, expected_maximum_sharpe(n, 0.5 / 250))
                 for n in (trials, trials + 1)]  # fmt: skip
        assert found[0] == pytest.approx(0.95, abs=2e-3) and found[1] < found[0]


def test_an_independent_formula():
    stats = pytest.importorskip("scipy.stats")
    returns, trials = skewed(), np.array([0.02, -0.01, 0.05, 0.11, 0.0])
    ratio = returns.mean() / returns.std(ddof=1)
    gamma = np.euler_gamma
    maximum = trials.std(ddof=1) * (
        (1 - gamma) * stats.norm.ppf(1 - 1 / 5) + gamma * stats.norm.ppf(1 - 1 / (5 * np.e))
    )
    error = np.sqrt((1 - stats.skew(returns) * ratio + stats.kurtosis(returns) / 4 * ratio**2 + ratio**2 / 2) / 249)
    assert deflated_sharpe(returns, 5, trials.var(ddof=1)) == pytest.approx(stats.norm.cdf((ratio - maximum) / error))
    assert probabilistic_sharpe(returns) == pytest.approx(stats.norm.cdf(ratio / error))


def test_skfolio():
    skfolio = pytest.importorskip("skfolio.measures")
    trials = np.array([0.02, -0.01, 0.05, 0.11, 0.0])
    for seed in range(3):
        returns = skewed(300, seed)
        ours = (
            probabilistic_sharpe(returns),
            probabilistic_sharpe(returns, 0.05),
            deflated_sharpe(returns, len(trials), trials.var(ddof=1)),
            expected_maximum_sharpe(len(trials), trials.var(ddof=1)),
        )
        theirs = (
            skfolio.probabilistic_sharpe_ratio(returns),
            skfolio.probabilistic_sharpe_ratio(returns, 0.05),
            skfolio.deflated_sharpe_ratio(returns, trials),
            skfolio.expected_max_sharpe_ratio(len(trials), trials.std(ddof=1)),
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize(("seed", "deflated"), [(0, 0.34111380335881), (1, 0.97592072663248), (2, 0.99367901869886)])
def test_numbers_of_skfolio(seed, deflated):
    """As skfolio 1.12.2 gave them, for where it is not installed."""
    variance = np.var([0.02, -0.01, 0.05, 0.11, 0.0], ddof=1)
    assert deflated_sharpe(skewed(300, seed), 5, variance) == pytest.approx(deflated, rel=1e-9)


def test_one_trial_is_not_deflated():
    returns = skewed()
    assert expected_maximum_sharpe(1, 0.3) == expected_maximum_sharpe(10, 0.0) == 0.0
    assert deflated_sharpe(returns, 1, 0.3) == probabilistic_sharpe(returns)
    assert deflated_sharpe(returns, 20, 0.002) < deflated_sharpe(returns, 2, 0.002) < probabilistic_sharpe(returns)


@pytest.mark.parametrize("returns", [[], [0.01], [0.0] * 100, [0.001] * 100, [0.1] * 99])
def test_a_curve_that_never_moves_has_no_ratio(returns):
    assert math.isnan(sharpe_of_days(returns)) and math.isnan(probabilistic_sharpe(returns))


def test_two_values_alone_have_no_probability():
    assert math.isnan(probabilistic_sharpe_of(1.0, 100, 2.0, 5.0))


@pytest.mark.parametrize("name", ["standard_normal", "standard_t", "exponential"])
def test_the_probabilistic_ratio_is_uniform_without_skill(name):
    rng = np.random.default_rng(0)
    draws = {"standard_t": lambda: rng.standard_t(5, 250), "exponential": lambda: rng.exponential(size=250) - 1}
    draw = draws.get(name, lambda: rng.standard_normal(250))
    found = np.sort([probabilistic_sharpe(draw()) for _ in range(4000)])
    distance = np.abs(found - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.63 / math.sqrt(4000)  # Kolmogorov and Smirnov, 1 %


def test_the_best_of_many_trials_without_skill_is_not_believed():
    """Undeflated, the best of 20 is above 95 % in 64 % of all searches; deflated, in no more than 5 %."""
    rng, plain, deflated = np.random.default_rng(2), [], []
    for _ in range(500):
        curves = rng.normal(size=(20, 250))
        ratios = curves.mean(axis=1) / curves.std(axis=1, ddof=1)
        best = curves[ratios.argmax()]
        plain.append(probabilistic_sharpe(best))
        deflated.append(deflated_sharpe(best, 20, ratios.var(ddof=1)))
    assert np.mean(np.array(plain) > 0.95) == pytest.approx(1 - 0.95**20, abs=0.07)
    assert np.mean(np.array(deflated) > 0.95) <= 0.05
    assert np.mean(deflated) == pytest.approx(0.5, abs=0.05)


def test_skill_is_still_found():
    rng = np.random.default_rng(3)
    curves = rng.normal(size=(20, 250))
    curves[7] += 0.4
    ratios = curves.mean(axis=1) / curves.std(axis=1, ddof=1)
    assert deflated_sharpe(curves[7], 20, ratios[np.arange(20) != 7].var(ddof=1)) > 0.95


# Clusters.


def dated(values: np.ndarray, first: int = 0) -> dict[str, float]:
    dates = ((FIRST_DAY + datetime.timedelta(first + i)).isoformat() for i in range(len(values)))
    return dict(zip(dates, values.tolist(), strict=True))


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_of_similar_trials_are_counted(groups):
    rng = np.random.default_rng(groups)
    bases = rng.normal(size=(groups, 200))
    curves = [dated(base + 0.5 * rng.normal(size=200)) for base in bases for _ in range(4)]
    assert count_clusters(curves) == groups
    assert count_clusters(curves[::-1]) == groups


def test_independent_trials_are_each_a_cluster():
    rng = np.random.default_rng(0)
    curves = [dated(x) for x in rng.normal(size=(30, 200))]
    assert count_clusters(curves) == 30
    assert count_clusters([dated(-x) for x in rng.normal(size=(1, 200))] + curves) == 31
    base = rng.normal(size=200)
    assert count_clusters([dated(base), dated(-base)]) == 2  # the opposite policy is another one


def test_a_chain_is_no_cluster():
    """Each is close to the next, and the ends have nothing in common: single linkage would count one."""
    noise = np.random.default_rng(4).normal(size=(13, 4000))
    curves = [dated(noise[i : i + 4].sum(axis=0)) for i in range(10)]
    assert 2 <= count_clusters(curves) <= 5


def test_few_trials_and_still_ones():
    assert count_clusters([]) == 0
    moving, still = dated(skewed(100)), dated(np.zeros(100))
    assert count_clusters([moving]) == count_clusters([still]) == count_clusters([still, still]) == 1
    assert count_clusters([moving, still, moving, still]) == 2


def test_correlations_are_those_of_the_common_dates():
    a, b = np.random.default_rng(5).normal(size=(2, 150)) + 3.0
    b[:50] += a[:50]
    b[50:90] -= 2 * a[50:90]
    found = correlate([dated(a[:90]), dated(b[30:], 30)])
    assert found[0, 1] == pytest.approx(np.corrcoef(a[30:90], b[30:90])[0, 1])
    assert found[0, 1] == pytest.approx(found[1, 0])
    assert correlate([dated(a[:90]), dated(b[70:], 70)])[0, 1] == 0  # 20 common days
    quiet = np.concatenate([np.zeros(60), a[:40]])
    assert correlate([dated(a[:60]), dated(quiet)])[0, 1] == 0  # it does not move on the common days


# The ledger's trials.


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def look(returns, settings="s0", split="val", first=0, symbol="BTCUSDT", venue="binance", step=100, result=None):
    returns = list(returns)
    times = {"first": START_MS + DAY_MS * first, "last": START_MS + DAY_MS * (first + len(returns))}
    dates = [(FIRST_DAY + datetime.timedelta(first + i)).isoformat() for i in range(len(returns))]
    return {
        "run": "runs/a", "step": step, "split": split, "settings": settings, "result": result or settings,
        "spans": [{"venue": venue, "symbol": symbol} | times], "dates": dates, "returns": returns,
    }  # fmt: skip


def test_a_first_look_at_validation(ledger):
    returns = skewed(90)
    found = judge_trials(ledger, look(returns))
    p = probabilistic_sharpe(returns)
    assert found == {
        "look": 1, "trials": 1, "effective": 1, "policies": 1, "probabilistic_sharpe": p, "deflated_sharpe": p,
        "deflated_sharpe_effective": p, "opened": None, "absent": {}, "ledger": str(ledger.path),
        "note": "Look number 1 of this validation split; 1 trial on validation. The ledger is a diary and no proof: it "
        "knows no looks on other machines or at the source files.",
    }  # fmt: skip
    (entry,) = ledger.entries()
    assert entry["kind"] == "evaluation" and entry["returns"] == returns.tolist() and entry["settings"] == "s0"


def test_policies_and_not_looks_are_the_trials_of_validation(ledger):
    curves = [skewed(90, seed) for seed in range(6)]
    for i, curve in enumerate(curves):
        found = judge_trials(ledger, look(curve, f"s{i}"))
    ratios = [sharpe_of_days(x) for x in curves]
    variance = statistics.variance(ratios)
    assert (found["look"], found["trials"], found["effective"]) == (6, 6, 6)
    assert found["deflated_sharpe"] == pytest.approx(deflated_sharpe(curves[5], 6, variance))
    assert found["deflated_sharpe"] < found["probabilistic_sharpe"]
    again = judge_trials(ledger, look(curves[5], "s5"))
    assert (again["look"], again["trials"]) == (7, 6)
    assert again["deflated_sharpe"] == found["deflated_sharpe"]
    later = judge_trials(ledger, look(curves[5], "s5", step=200))  # another checkpoint of the run
    assert (later["look"], later["trials"], later["effective"]) == (8, 7, 6)
    assert later["deflated_sharpe"] < later["deflated_sharpe_effective"] < later["probabilistic_sharpe"]


def test_a_look_without_settings_is_told_by_its_result(ledger):
    for result, trials in (("r0", 1), ("r0", 1), ("r1", 2)):
        assert judge_trials(ledger, look(skewed(70), settings=None, result=result))["trials"] == trials


def test_looks_at_test(ledger):
    for i in range(3):
        judge_trials(ledger, look(skewed(90, i), f"s{i}"))
    judge_trials(ledger, look(skewed(90, 9), "eth", symbol="ETHUSDT"))
    first = judge_trials(ledger, look(skewed(80, 10), "s2", "test", first=100))
    assert (first["look"], first["trials"], first["policies"], first["opened"]) == (1, 3, 1, 0)
    assert first["deflated_sharpe"] == first["probabilistic_sharpe"]
    assert "deflated_sharpe_effective" not in first
    assert first["note"].startswith("Look number 1 of this test split; 3 trials on validation.")
    # The same policy and the same result: a new look, no new policy.
    second = judge_trials(ledger, look(skewed(80, 10), "s2", "test", first=100))
    assert (second["look"], second["policies"], second["deflated_sharpe"]) == (2, 1, first["deflated_sharpe"])
    third = judge_trials(ledger, look(skewed(80, 11), "s1", "test", first=100))
    variance = statistics.variance([sharpe_of_days(skewed(80, seed)) for seed in (10, 11)])
    assert (third["look"], third["policies"]) == (3, 2)
    assert third["deflated_sharpe"] == pytest.approx(deflated_sharpe(skewed(80, 11), 2, variance))


def test_a_rebuilt_dataset_does_not_reset_the_looks(ledger):
    judge_trials(ledger, look(skewed(80), "s0", "test", first=100))
    moved = judge_trials(ledger, look(skewed(90), "s1", "test", first=130, venue=""))
    assert moved["look"] == 2
    away = judge_trials(ledger, look(skewed(90), "s2", "test", first=160))
    assert away["look"] == 2  # 60 of 90 days in common with the second, 20 with the first
    assert "1 other evaluation saw some of these days." in away["note"]
    assert judge_trials(ledger, look(skewed(90), "s1", "test", first=300))["look"] == 1
    assert judge_trials(ledger, look(skewed(80), "s1", "test", first=100, venue="bybit"))["look"] == 2
    was_test = judge_trials(ledger, look(skewed(80), "s3", "val", first=100, symbol="BTCUSDT"))
    assert was_test["look"] == 1 and "other evaluations saw some of these days." in was_test["note"]


def test_openings_are_counted(ledger):
    spans = look(skewed(80), first=100)["spans"]
    for split in ("test", "test", "val"):
        ledger.append({"kind": "opened", "source": "datasets/btc", "split": split, "spans": spans})
    found = judge_trials(ledger, look(skewed(80), "s0", "test", first=100))
    assert found["opened"] == 2 and found["look"] == 1
    assert "other programs loaded it 2 times" in found["note"]


@pytest.mark.parametrize(
    ("returns", "why"),
    [
        (skewed(LEAST_DAYS - 1), "59 days, under 60"),
        (np.zeros(90), "equity never moved"),
        (np.append(skewed(89), np.nan), "a daily return is not a number"),
        ([], "0 days, under 60"),
    ],
)
def test_a_figure_without_a_meaning_is_absent(ledger, returns, why):
    found = judge_trials(ledger, look(returns))
    names = {"probabilistic_sharpe", "deflated_sharpe", "deflated_sharpe_effective"}
    assert found["absent"] == dict.fromkeys(names, why) and not names & found.keys()


def test_idle_policies_are_trials_without_a_ratio(ledger):
    judge_trials(ledger, look(np.zeros(90), "idle"))
    judge_trials(ledger, look([math.nan] * 90, "ruined"))
    judge_trials(ledger, look(skewed(90), "s0"))
    found = judge_trials(ledger, look(skewed(90, 1), "s1"))
    variance = statistics.variance([sharpe_of_days(skewed(90, seed)) for seed in (0, 1)])
    assert (found["trials"], found["effective"]) == (4, 3)
    assert found["deflated_sharpe"] == pytest.approx(deflated_sharpe(skewed(90, 1), 4, variance))


def test_entries_of_other_versions_are_passed_over(ledger):
    spans = look(skewed(90))["spans"]
    ledger.append({"kind": "evaluation", "spans": spans})
    ledger.append({"kind": "evaluation", "spans": spans} | {"split": "val", "dates": ["x"], "returns": [1, 2]})
    ledger.append({"kind": "something new", "spans": spans})
    assert judge_trials(ledger, look(skewed(90)))["look"] == 1


def test_without_a_writable_ledger_the_look_is_still_judged(tmp_path):
    (tmp_path / "file").write_text("")
    ledger = Ledger(tmp_path / "file" / "ledger.jsonl")
    with pytest.warns(UserWarning, match="ledger"):
        found = judge_trials(ledger, look(skewed(90)))
    assert (found["look"], found["trials"]) == (1, 1)
    assert "This look could not be entered." in found["note"]


def test_a_look_must_be_whole(ledger):
    with pytest.raises(ValueError, match="59 dates and 60 daily returns"):
        judge_trials(ledger, look(skewed(60)) | {"dates": ["2025-01-01"] * 59})
    with pytest.raises(ValueError, match="lacks settings"):
        judge_trials(ledger, {name: x for name, x in look(skewed(60)).items() if name != "settings"})
    assert ledger.entries() == []


# The seal.


def test_only_the_evaluation_may_break_the_seal():
    """`open_sealed` loads the test split without an entry; no other module names it."""
    root = pathlib.Path(train.__file__).parents[1]
    for path in [p for name in ("perpjax", "train", "benchmarks") for p in (root / name).rglob("*.py")]:
        if "open_sealed" in path.read_text(encoding="utf-8"):
            where = path.relative_to(root).as_posix()
            assert where in ("perpjax/data/dataset.py", "train/ppo/judge.py"), where
