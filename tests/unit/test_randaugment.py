"""Compare RandAugment with timm 1.0.x: the grammar, the distribution of the draws, and the pixels."""

import math
import random

import numpy as np
import pytest

from sws_dist.data.randaugment import OPERATORS, SKIP, RandAugment, RandAugmentDraws, affine_matrix, apply_layer, warp

pytest.importorskip("nvidia.dali")
PIL_Image = pytest.importorskip("PIL.Image")
timm_augment = pytest.importorskip("timm.data.auto_augment")
sklearn_datasets = pytest.importorskip("sklearn.datasets")  # two real photographs

from nvidia.dali import fn, pipeline_def  # noqa: E402

HEIGHT, WIDTH = 192, 256  # not square, so that a mix-up of the axes shows
FILL = (124, 116, 104)
GEOMETRIC_MAXIMUM = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}
INTEGER_ARGUMENT = {"PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"}
NO_ARGUMENT = {"AutoContrast", "Equalize", "Invert"}


# ---- The grammar ----


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment(magnitude=9, magnitude_std=0.5)),
        ("rand-inc1", RandAugment(magnitude=10, magnitude_std=0, magnitude_max=10, num_layers=2, prob=0.5)),
        ("rand-inc1-p0.7-n3-m6", RandAugment(magnitude=6, num_layers=3, prob=0.7)),
        ("rand-m15-mmax20-mstd101-inc1", RandAugment(15, magnitude_std=math.inf, magnitude_max=20)),
    ],
)
def test_parse_accepts_what_timm_accepts(policy: str, expected: RandAugment) -> None:
    assert RandAugment.parse(policy) == expected
    (theirs, *_) = timm_augment.rand_augment_transform(policy, {}).ops
    assert (theirs.magnitude, theirs.magnitude_std, theirs.prob) == (
        expected.magnitude,
        expected.magnitude_std,
        expected.prob,
    )


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ("rand-m9-mstd0.5", "-inc1"),
        ("rand-m9-inc0", "-inc1"),
        ("rand-m9-tweights-inc1", "'tweights'"),
        ("rand-m9-t3a-inc1", "'t3a'"),
        ("rand-m9-w0-inc1", "'w0'"),
        ("rand-m9-q3-inc1", "'q3'.*known pieces"),
        ("rand-m9-mstd-inc1", "'mstd'.*known pieces"),  # timm ignores a piece without a number
        ("rand-m9.5-inc1", r"'m9\.5'.*int"),
        ("rand-m9-m8-inc1", "'m8'.*second time"),
        ("rand-n0-inc1", "from 1 to 100"),
        ("rand-p1.5-inc1", r"\[0, 1\]"),
        ("original-mstd0.5", "'original'.*rand"),
        ("augmix-m5-w4-d2", "'augmix'.*rand"),
        ("3a", "'3a'.*rand"),
        ("", "rand"),
    ],
)
def test_parse_refuses_the_rest_by_name(policy: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RandAugment.parse(policy)


# ---- The draws ----


def draw_one_layer(operator: int, magnitude: float, sign: int) -> RandAugmentDraws:
    """Draw exactly this operator, magnitude and sign for one image."""
    uniforms = np.array([[(operator + 0.5) / len(OPERATORS), 0.0, 0.25 if sign > 0 else 0.75, 0.5, 0.5]])
    return RandAugment(magnitude, num_layers=1, prob=1.0).draw(uniforms, HEIGHT, WIDTH)


def test_operators_are_timms() -> None:
    assert tuple(timm_augment._RAND_INCREASING_TRANSFORMS) == OPERATORS


def test_strength_is_timms_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    for sign in (1, -1):
        monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        for operator, name in enumerate(OPERATORS):
            for magnitude in np.linspace(0, 10, 41):
                draws = draw_one_layer(operator, magnitude, sign)
                assert draws.operator.tolist() == [[operator]]
                to_argument = timm_augment.LEVEL_TO_ARG[name]
                expected = to_argument(magnitude, {})[0] if to_argument else 0.0
                if name == "PosterizeIncreasing":
                    expected = max(1, expected)  # Pillow refuses 0 bits
                assert draws.strength[0, 0] == np.float32(expected), (name, magnitude, sign)


def timm_draws(policy: str, count: int) -> dict[str, list[float]]:
    """Run timm's own transform, and record the arguments of its image functions instead of calling them."""
    drawn: dict[str, list[float]] = {name: [] for name in OPERATORS}
    transform = timm_augment.rand_augment_transform(policy, {})
    for operator in transform.ops:
        operator.aug_fn = lambda image, argument=0.0, *, name=operator.name, **_: drawn[name].append(argument)
    random.seed(6)
    np.random.seed(6)
    for _ in range(count):
        transform(None)
    return drawn


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference between the distribution functions of two samples, in units of its scale."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    difference = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
    return float(np.abs(difference).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b))))


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m8-n3-p0.3-mstd101-inc1", "rand-m9-mmax14-mstd4-inc1"]
)
def test_distribution_is_timms(policy: str) -> None:
    count = 20_000
    ours = RandAugment.parse(policy)
    draws = ours.draw(np.random.default_rng(5).random((count, ours.num_uniforms)), HEIGHT, WIDTH)
    theirs = timm_draws(policy, count)

    skipped = count * ours.num_layers - sum(map(len, theirs.values()))
    expected = np.array([skipped, *map(len, theirs.values())])
    observed = np.array([(draws.operator == i).sum() for i in range(SKIP, len(OPERATORS))])
    chi_square = ((observed - expected) ** 2 / (observed + expected)).sum()
    assert chi_square < 37.7  # 15 degrees of freedom, one in a thousand

    strengths = {name: draws.strength[draws.operator == i] for i, name in enumerate(OPERATORS)}
    their_strengths = {name: np.array(values, dtype=np.float32) for name, values in theirs.items()}
    their_strengths["PosterizeIncreasing"] = their_strengths["PosterizeIncreasing"].clip(min=1)
    for name in OPERATORS:
        assert kolmogorov_smirnov(strengths[name], their_strengths[name]) < 1.95, name  # one in a thousand
    # The operators that are linear in the magnitude are pooled: together they show what noise would hide in each.
    pooled, their_pooled = (
        np.concatenate([np.abs(of[name]) / maximum for name, maximum in GEOMETRIC_MAXIMUM.items()])
        for of in (strengths, their_strengths)
    )
    assert kolmogorov_smirnov(pooled, their_pooled) < 1.95


def test_layers_are_drawn_independently() -> None:
    policy = RandAugment(9, magnitude_std=0.5)
    draws = policy.draw(np.random.default_rng(3).random((20_000, policy.num_uniforms)), HEIGHT, WIDTH)
    first, second = draws.operator.T
    both = np.histogram2d(first, second, bins=np.arange(-1.5, len(OPERATORS)))[0]
    expected = np.outer(both.sum(1), both.sum(0)) / both.sum()
    assert ((both - expected) ** 2 / expected).sum() < 296.0  # 225 degrees of freedom, one in a thousand


def test_draw_depends_on_its_own_row_only() -> None:
    policy = RandAugment.parse("rand-m9-mstd0.5-inc1")
    uniforms = np.random.default_rng(4).random((257, policy.num_uniforms))
    rows = np.array([256, 3, 3, 100, 31])
    for whole, part in zip(
        policy.draw(uniforms, HEIGHT, WIDTH), policy.draw(uniforms[rows], HEIGHT, WIDTH), strict=True
    ):
        np.testing.assert_array_equal(whole[rows], part)
    with pytest.raises(ValueError, match="shape"):
        policy.draw(uniforms[:, 1:], HEIGHT, WIDTH)


def test_draws_have_the_declared_form() -> None:
    policy = RandAugment(9, num_layers=3)
    extremes = np.array([[0.0] * policy.num_uniforms, [np.nextafter(1.0, 0.0)] * policy.num_uniforms])
    draws = policy.draw(extremes, HEIGHT, WIDTH)
    assert [array.shape for array in draws] == [(2, 3), (2, 3), (2, 3, 3, 3)]
    assert [array.dtype for array in draws] == [np.int32, np.float32, np.float32]
    assert draws.operator.tolist() == [[0] * 3, [SKIP] * 3]
    np.testing.assert_array_equal(draws.matrix, np.broadcast_to(np.eye(3), (2, 3, 3, 3)))


# ---- The pixels ----

# Largest mean absolute difference from Pillow in 8-bit units: (worst case, mean over the cases). Comments in the module
# explain those that are not exact.
EXACT = (0.002, 0.001)
BOUNDS = dict.fromkeys(OPERATORS, EXACT) | {
    "Equalize": (0.6, 0.5),
    "Rotate": (1.5, 1.0),
    "ShearX": (1.2, 0.8),
    "ShearY": (1.2, 0.8),
    "TranslateXRel": (1.2, 0.7),
    "TranslateYRel": (1.2, 0.7),
}


def photographs() -> list[np.ndarray]:
    names = ("china.jpg", "flower.jpg")
    images = [sklearn_datasets.load_sample_image(name)[100:, 200:] for name in names]
    return [np.ascontiguousarray(image[:HEIGHT, :WIDTH]) for image in images]


def run_layer(images: list[np.ndarray], operator: np.ndarray, strength: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply one layer to the batch. Returns [B, HEIGHT, WIDTH, 3] uint8."""

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, enable_conditionals=True)
    def pipeline():
        batch = (images, operator, strength, matrix)
        nodes = fn.external_source(lambda: batch, num_outputs=4, layout=["HWC", "", "", ""])
        return apply_layer(*nodes, fill=FILL)

    (out,) = pipeline().run()
    return out.as_array()


def pillow(image: np.ndarray, name: str, strength: float) -> np.ndarray:
    """Apply timm's own function of this operator."""
    arguments = [] if name in NO_ARGUMENT else [int(strength) if name in INTEGER_ARGUMENT else strength]
    options = {"fillcolor": FILL, "resample": PIL_Image.Resampling.BICUBIC}
    return np.asarray(timm_augment.NAME_TO_OP[name](PIL_Image.fromarray(image), *arguments, **options))


def test_every_operator_gives_timms_pixels() -> None:
    cases = [
        (image, draw_one_layer(operator, magnitude, sign))
        for operator in range(len(OPERATORS))
        for magnitude in (0, 2.5, 6, 9, 10)
        for sign in (1, -1)
        for image in photographs()
    ]
    arrays = [np.concatenate(field)[:, 0] for field in zip(*(draws for _, draws in cases), strict=True)]
    got = run_layer([image for image, _ in cases], *arrays)

    errors: dict[str, list[float]] = {name: [] for name in OPERATORS}
    for pixels, (image, draws) in zip(got, cases, strict=True):
        name = OPERATORS[draws.operator[0, 0]]
        expected = pillow(image, name, float(draws.strength[0, 0]))
        errors[name].append(np.abs(pixels.astype(np.int16) - expected).mean())
    for name, values in errors.items():
        worst, mean = BOUNDS[name]
        print(f"{name:22s} worst {max(values):.4f} mean {np.mean(values):.4f}")  # shown by pytest -s
        assert max(values) <= worst, name
        assert np.mean(values) <= mean, name


def test_skipped_layers_and_flat_images_are_left_alone() -> None:
    photograph = photographs()[0]
    flat = np.full_like(photograph, 77)
    operator = np.array([SKIP, OPERATORS.index("AutoContrast"), OPERATORS.index("Equalize")], dtype=np.int32)
    images = [photograph, flat, flat]
    identity = np.tile(np.eye(3, dtype=np.float32), (3, 1, 1))
    got = run_layer(images, operator, np.zeros(3, np.float32), identity)
    np.testing.assert_array_equal(got, images)


def test_affine_matrix_is_torchvisions() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = photographs()[1]
    degrees, scale = np.array([20.0, -35.0, 0.0]), np.array([1.0, 1.3, 0.8])
    shift_x, shift_y = np.array([0, 12, -30]), np.array([0, -20, 9])
    matrix = affine_matrix(degrees, scale, shift_x, shift_y, HEIGHT, WIDTH)
    assert matrix.shape == (3, 3, 3)
    assert matrix.dtype == np.float32

    @pipeline_def(batch_size=3, num_threads=2, device_id=None)
    def pipeline():
        nodes = fn.external_source(lambda: ([image] * 3, matrix), num_outputs=2, layout=["HWC", ""])
        return warp(*nodes, fill=FILL)

    (out,) = pipeline().run()
    for i, pixels in enumerate(out.as_array()):
        expected = functional.affine(
            PIL_Image.fromarray(image),
            degrees[i],
            [int(shift_x[i]), int(shift_y[i])],
            scale[i],
            shear=[0.0],
            interpolation=functional.InterpolationMode.BICUBIC,
            fill=FILL,
        )
        assert np.abs(pixels.astype(np.int16) - np.asarray(expected)).mean() < 1.2
