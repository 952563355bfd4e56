"""Target: what may be asked, how it is named."""

import dataclasses
import math

import pytest

from layerwise.contract.target import Target

LABELS = {
    "dense": Target(),
    "50% row": Target(0.5),
    "62.5% layer": Target(0.625, "layer"),
    "2:4": Target(pattern="2:4"),
    "4:8": Target(0.5, "4:8"),
    "50% 1x16": Target(0.5, "1x16"),
    "4b": Target(bits=4),
    "3b g128": Target(bits=3, group=128),
    "4b sym": Target(bits=4, symmetric=True),
    "4b g64 sym": Target(bits=4, group=64, symmetric=True),
    "2:4 4b": Target(pattern="2:4", bits=4),
    "50% row 4b g16": Target(0.5, bits=4, group=16),
    "nvfp4": Target(format="nvfp4"),
    "2:4 mxfp4": Target(pattern="2:4", format="mxfp4"),
    "rank 40%": Target(rank=0.4),
    "50% row rank 12.5%": Target(0.5, rank=0.125),
    "2:4 rank 10%": Target(pattern="2:4", rank=0.1),
    "4b g128 rank 5%": Target(bits=4, group=128, rank=0.05),
    "2:4 4b sym rank 5%": Target(pattern="2:4", bits=4, symmetric=True, rank=0.05),
    "nvfp4 rank 5%": Target(format="nvfp4", rank=0.05),
    "rank 40% 4b": Target(rank=0.4, factor_bits=4),
    "rank 40% 3b g64": Target(rank=0.4, factor_bits=3, factor_group=64),
    "4b g128 rank 5% 8b g64": Target(bits=4, group=128, rank=0.05, factor_bits=8, factor_group=64),
}
STRUCTURES = {
    "dense": [Target(), Target(bits=4), Target(0.0, "layer"), Target(0.0, "1x16"), Target(bits=4, rank=0.1)],
    "row": [Target(0.5), Target(0.5, bits=4), Target(0.5, rank=0.1)],
    "low rank": [Target(rank=0.4), Target(0.0, "layer", rank=0.4)],
    "layer": [Target(0.7, "layer")],
    "n:m": [Target(pattern="2:4"), Target(pattern="1:4"), Target(pattern="2:4", bits=4)],
    "1xb": [Target(0.5, "1x16"), Target(0.5, "1x1")],
}


@pytest.mark.parametrize("label", LABELS)
def test_labels(label: str):
    assert LABELS[label].label == label


def test_labels_tell_targets_apart():
    assert len({target.label for target in LABELS.values()}) == len(LABELS)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures(structure: str):
    assert {target.structure for target in STRUCTURES[structure]} == {structure}


def test_a_pattern_fixes_the_sparsity():
    assert Target(pattern="1:4").sparsity == 0.75
    assert Target(pattern="2:4") == Target(0.5, "2:4")
    assert Target(pattern="4:8").n_of_m == (4, 8) and Target(pattern="4:8").block is None
    assert Target(0.5, "1x16").block == 16 and Target(0.5, "1x16").n_of_m is None


def test_nothing_to_prune_has_one_spelling():
    assert Target(0.0, "layer") == Target(0.0, "1x16") == Target()


def test_a_target_goes_through_its_dict():
    for target in LABELS.values():
        assert Target(**target.as_dict()) == target
        assert hash(Target(**target.as_dict())) == hash(target)


def test_a_config_names_a_format_under_bits():
    assert Target(bits="nvfp4") == Target(format="nvfp4", bits=4, group=16)  # type: ignore[arg-type]
    assert Target(format="mxfp4").as_dict() | {"sparsity": 0} == {
        **{"sparsity": 0, "pattern": "row", "bits": "mxfp4", "group": 32, "symmetric": False}
    }
    assert Target(format="mxfp4").grid == Target(format="mxfp4") and Target(0.5, format="mxfp4").pruning == Target(0.5)
    assert Target(format="mxfp4").budget == "mxfp4"


@pytest.mark.parametrize("label", ["4b g16", "rank 40% 3b g64"])
def test_whole_numbers_may_be_floats(label: str):
    plain = LABELS.get(label) or Target(bits=4, group=16)
    fields: dict = {name: float(value) if type(value) is int else value for name, value in vars(plain).items()}
    target = Target(**fields)
    assert target.label == label and repr(target) == repr(plain) and str(target.as_dict()) == str(plain.as_dict())


def test_a_target_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Target().sparsity = 0.5  # type: ignore[misc]


WRONG = [
    ({"pattern": "column"}, "Target.pattern must be 'row', 'layer', 'n:m' or '1xb'. Got 'column' instead."),
    ({"pattern": "2x4"}, "Target.pattern must be"),
    ({"pattern": 124}, "Target.pattern must be 'row', 'layer', 'n:m' or '1xb'. Got 124 instead."),
    ({"bits": 4, "symmetric": "yes"}, "Target.symmetric must be True or False. Got 'yes' instead."),
    ({"pattern": "0:4"}, "Target.pattern must be"),
    ({"pattern": "row\n"}, "Target.pattern must be"),
    ({"pattern": "4:4"}, "Target.pattern n:m must keep n of m, n < m. Got '4:4' instead."),
    ({"pattern": "8:4"}, "Target.pattern n:m must keep n of m"),
    ({"pattern": "2:4", "sparsity": 0.6}, "Target.sparsity of pattern '2:4' must be 0.5. Got 0.6 instead."),
    ({"sparsity": 1.0}, "Target.sparsity must be in [0, 1). Got 1.0 instead."),
    ({"sparsity": -0.1}, "Target.sparsity must be in [0, 1)"),
    ({"sparsity": math.nan}, "Target.sparsity must be in [0, 1)"),
    ({"bits": 1}, "Target.bits must be 2 to 8. Got 1 instead."),
    ({"bits": 9}, "Target.bits must be 2 to 8"),
    ({"bits": "fp4"}, "Target.bits must be 2 to 8, nvfp4, mxfp4. Got 'fp4' instead."),
    ({"bits": "nvfp4", "group": 128}, "Target.group of nvfp4 must be 16. Got 128 instead."),
    ({"bits": "mxfp4", "group": 16}, "Target.group of mxfp4 must be 32. Got 16 instead."),
    ({"bits": "mxfp4", "symmetric": True}, "Target.symmetric must be False for mxfp4"),
    ({"bits": 3, "format": "mxfp4"}, "Target.bits of mxfp4 must be 4. Got 3 instead."),
    ({"format": "int4"}, "Target.format must be nvfp4 or mxfp4. Got 'int4' instead."),
    ({"bits": 4.5}, "Target.bits must be a whole number. Got 4.5 instead."),
    ({"bits": 4, "group": "128"}, "Target.group must be a number. Got '128' instead."),
    ({"rank": "40%"}, "Target.rank must be a number. Got '40%' instead."),
    ({"sparsity": None}, "Target.sparsity must be a number. Got None instead."),
    ({"rank": 0.1, "factor_bits": "nvfp4"}, "Target.factor_bits must be a number. Got 'nvfp4' instead."),
    ({"bits": math.nan}, "Target.bits must be a whole number. Got nan instead."),
    ({"bits": 4, "group": 2.5}, "Target.group must be a whole number. Got 2.5 instead."),
    ({"bits": 4, "group": 0}, "Target.group must be a number of inputs, at least 1. Got 0 instead."),
    ({"rank": 1.0}, "Target.rank must be a share of the weights, in [0, 1). Got 1.0 instead."),
    ({"rank": -0.1}, "Target.rank must be a share"),
    ({"rank": math.nan}, "Target.rank must be a share"),
    ({"rank": 0.1, "factor_bits": 1}, "Target.factor_bits must be 2 to 8. Got 1 instead."),
    ({"rank": 0.1, "factor_bits": 4.5}, "Target.factor_bits must be a whole number. Got 4.5 instead."),
    ({"rank": 0.1, "factor_bits": 4, "factor_group": 0}, "Target.factor_group must be a number of entries"),
    ({"rank": 0.1, "factor_group": 64}, "Target.factor_bits must be given with Target.factor_group. Got None instead."),
    ({"factor_bits": 4}, "Target.rank must be above 0 with Target.factor_bits. Got 0 instead."),
    ({"group": 128}, "Target.bits must be given with Target.group or Target.symmetric. Got None instead."),
    ({"symmetric": True}, "Target.bits must be given with Target.group or Target.symmetric"),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_a_wrong_target_is_one_sentence(fields: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        Target(**fields)
    assert str(caught.value).startswith(sentence) and str(caught.value).endswith(".")


def test_factors_have_at_most_the_share_of_the_weights():
    for share, out, inputs, rank in ((0.6, 96, 128, 32), (0.8, 96, 128, 43), (0.5, 1, 64, 0), (0.5, 24, 64, 8)):
        assert Target(rank=share).rank_of(out, inputs) == Target(0.5, rank=share).rank_of(out, inputs) == rank
        assert rank * (out + inputs) <= share * out * inputs < (rank + 1) * (out + inputs)


def test_a_rank_leaves_the_rest_of_a_target_alone():
    whole = Target(0.5, "2:4", bits=4, group=16, rank=0.1)
    assert whole.rest == Target(0.5, "2:4", bits=4, group=16) and Target(rank=0.3).rest.dense
    assert whole.pruning == Target(pattern="2:4") and whole.grid == Target(bits=4, group=16)
    assert not Target(rank=0.3).dense and Target(rank=0.3).level == 0.3 and Target(rank=0.3).at(0.4) == Target(rank=0.4)
    assert (whole.budget, Target(rank=0.3).budget) == ("sum of parts", "low rank") and whole.level == 0.5
    assert whole.paired and Target(rank=0.3).paired and not Target(bits=4).paired
    rounded = Target(0.5, rank=0.1, factor_bits=4, factor_group=64)
    assert rounded.rest == Target(0.5) and rounded.unrounded == Target(0.5, rank=0.1)
    assert rounded.factors == Target(bits=4, group=64) and whole.factors.dense and whole.unrounded == whole
    assert (rounded.budget, rounded.rank_of(24, 64)) == ("sum of parts", rounded.unrounded.rank_of(24, 64))
    assert whole.as_dict().keys() < rounded.as_dict().keys()  # cells with factors of 16 bits keep their names
    assert "rank" not in Target(0.5).as_dict() and whole.as_dict()["rank"] == 0.1  # cells without one keep their names
