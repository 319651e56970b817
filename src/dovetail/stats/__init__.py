"""Statistics below the models: small, exact, vectorised; nothing here imports anything above."""

from __future__ import annotations

from dovetail.stats.approximation import (
    Approximation,
    RunningMean,
    iterates,
    kiefer_wolfowitz,
    robbins_monro,
    sgd,
)
from dovetail.stats.calibration import Calibration, calibrate_temperature, calibrate_temperature_online
from dovetail.stats.column import read_arrivals, read_numbers
from dovetail.stats.control import AdaptiveKL
from dovetail.stats.extrema import (
    SlidingMax,
    SlidingMin,
    peaks,
    sliding_argmax,
    sliding_argmin,
    sliding_max,
    sliding_min,
)
from dovetail.stats.gaps import Gap, largest_gap
from dovetail.stats.goodness import Goodness, counts_test, dispersion_test, times_test
from dovetail.stats.ngram import (
    AddK,
    GoodTuring,
    KneserNey,
    MaximumLikelihood,
    NGram,
    StupidBackoff,
    WittenBell,
)
from dovetail.stats.poisson import Piecewise, PoissonFit, PoissonProcess, arrival_counts, waiting_times
from dovetail.stats.schedules import (
    Condition,
    Geometric,
    Power,
    Verdict,
    constant,
    dvoretzky_conditions,
    harmonic,
    kiefer_wolfowitz_conditions,
    robbins_monro_conditions,
)
from dovetail.stats.words import (
    AnalogyScore,
    Cbow,
    Corpus,
    Glove,
    Pmi,
    SkipGram,
    Vocabulary,
    WordVectors,
    cooccurrences,
    one_hot,
    ppmi,
    sentences_of,
    spearman,
)

__all__ = [
    "AdaptiveKL", "AddK", "AnalogyScore", "Approximation", "Calibration", "Cbow", "Condition", "Corpus", "Gap",
    "Geometric", "Glove", "GoodTuring", "Goodness", "KneserNey", "MaximumLikelihood", "NGram", "Piecewise", "Pmi",
    "PoissonFit", "PoissonProcess", "Power", "RunningMean", "SkipGram", "SlidingMax", "SlidingMin", "StupidBackoff",
    "Verdict", "Vocabulary", "WittenBell", "WordVectors", "arrival_counts", "calibrate_temperature",
    "calibrate_temperature_online", "constant", "cooccurrences", "counts_test", "dispersion_test",
    "dvoretzky_conditions", "harmonic", "iterates", "kiefer_wolfowitz", "kiefer_wolfowitz_conditions",
    "largest_gap", "one_hot", "peaks", "ppmi", "read_arrivals", "read_numbers", "robbins_monro",
    "robbins_monro_conditions", "sentences_of", "sgd", "sliding_argmax", "sliding_argmin", "sliding_max",
    "sliding_min", "spearman", "times_test", "waiting_times",
]  # fmt: skip
