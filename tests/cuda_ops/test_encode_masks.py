"""Codes of masks: what pycocotools makes of masks pasted by Detectron2's rule, or, byte for byte, of torchvision's
pasted masks.
"""

from collections import namedtuple

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

import cuda_ops
from cuda_ops import encode_masks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within pycocotools

only_compiled = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
Polygons = namedtuple("Polygons", "xy part_offsets instance_offsets max_vertices max_parts")
CONVENTIONS = ("detectron2", "torchvision")
both_conventions = pytest.mark.parametrize("conventions", CONVENTIONS)


def encode_on_whole_pixels(*args):
    return encode_masks(*args, conventions="torchvision")


def coded(mask):
    return coco_mask.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8)))


def pasted_by_grid_sample(probs, boxes, size):
    """Probabilities at the centres of pixels [D, h, w] float64: Detectron2's paste_masks_in_image before its threshold,
    of whole images.
    """
    height, width = size
    low, side = boxes.double()[:, None, :2], (boxes[:, 2:] - boxes[:, :2]).double()[:, None]
    x = (torch.arange(width) + 0.5)[None, :, None].double().sub(low[..., :1]).div(side[..., :1]).mul(2).sub(1)
    y = (torch.arange(height) + 0.5)[None, :, None].double().sub(low[..., 1:]).div(side[..., 1:]).mul(2).sub(1)
    shape = (len(boxes), height, width, 1)
    grid = torch.cat((x[:, None].expand(shape), y[:, :, None].expand(shape)), dim=-1)
    return F.grid_sample(probs[:, None].double(), grid, align_corners=False)[:, 0]


def iou(one, two):
    return coco_mask.iou([one], [two], [0])[0, 0]


def test_a_mask_of_ones_is_its_box():
    """Of whole pixels, and of all pixels whose centres lie in it."""
    boxes = torch.tensor([[10.0, 12.0, 18.0, 20.0], [5.0, 5.0, 37.0, 37.0], [1.0, 1.0, 2.0, 3.0], [2.6, 3.4, 9.4, 8.6]])
    codes = encode_masks(torch.ones(4, 28, 28), boxes, (40, 40))
    for code, (x1, y1, x2, y2) in zip(
        codes, [(10, 12, 18, 20), (5, 5, 37, 37), (1, 1, 2, 3), (3, 3, 9, 9)], strict=True
    ):
        mask = np.zeros((40, 40))
        mask[y1:y2, x1:x2] = 1
        assert iou(code, coded(mask)) == 1
        assert code["size"] == [40, 40]
        assert isinstance(code["counts"], bytes)
    (code,) = encode_on_whole_pixels(torch.ones(1, 28, 28), boxes[:1], (40, 40))
    assert int(coco_mask.area(code)) == 100, "torchvision's is larger than the box: 10 × 10 for 8 × 8"


def test_a_pixel_of_just_the_threshold_is_set():
    """As in Detectron2, and unlike torchvision; the box ends at the centre of a pixel, where a mask of ones has 0.5."""
    (code,) = encode_masks(torch.ones(1, 4, 4), torch.tensor([[0.5, 0.0, 8.5, 8.0]]), (9, 9))
    assert coco_mask.decode(code).any(0).tolist() == [True] * 9
    (code,) = encode_masks(torch.ones(1, 4, 4), torch.tensor([[0.5, 0.0, 8.5, 8.0]]), (9, 9), 0.500001)
    assert coco_mask.decode(code).any(0).tolist() == [False] + [True] * 7 + [False]


def test_detectron2s_masks_are_sampled_at_the_centres_of_pixels():
    """Pixels within 1e-5 of the threshold may round to either side."""
    num_pixels = 0
    for seed in range(120):
        probs, boxes, size, _, _ = random_case(seed)
        if not len(probs):
            continue
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        expected = pasted_by_grid_sample(probs[has_area], boxes[has_area], size)
        codes = encode_masks(probs[has_area], boxes[has_area], size)
        decoded = torch.from_numpy(np.stack([coco_mask.decode(code) for code in codes])).bool()
        is_certain = (expected - 0.5).abs() > 1e-5
        assert torch.equal(decoded & is_certain, (expected > 0.5) & is_certain), f"seed {seed}"
        num_pixels += int(decoded.sum())
    assert num_pixels > 100_000


def test_cutting_out_and_pasting_are_inverse():
    """Detectron2's test_crop_paste_consistency: polygons cut out to 28 × 28 and pasted give back their pixels, on
    average to an IoU above 0.94.
    """
    random, ious = np.random.RandomState(0), {name: [] for name in CONVENTIONS}
    for _ in range(100):
        angles = np.sort(random.uniform(0, 2 * np.pi, 12))
        radii = random.uniform(0.6, 1, 12) * np.exp(random.uniform(np.log(8), np.log(120)))
        xy = np.stack((np.cos(angles), np.sin(angles)), 1) * radii[:, None] + random.uniform(130, 170, 2)
        box = torch.tensor([*xy.min(0), *xy.max(0)], dtype=torch.float32)[None]
        polygons = Polygons(torch.from_numpy(xy), torch.tensor([0, 12]), torch.tensor([0, 1]), 12, 1)
        cut = cuda_ops.rasterize_polygons(box[None], torch.zeros(1, 1, dtype=torch.int64), polygons, 28)[0]
        truth = coco_mask.merge(coco_mask.frPyObjects([xy.flatten().tolist()], 300, 300))
        for name in CONVENTIONS:
            (code,) = encode_masks(cut, box, (300, 300), conventions=name)
            ious[name].append(iou(code, truth))
    assert np.mean(ious["detectron2"]) > 0.94
    assert np.mean(ious["torchvision"]) < np.mean(ious["detectron2"]) - 0.01


@both_conventions
def test_a_mask_over_the_whole_image_is_one_run(conventions):
    (rle,) = encode_masks(torch.ones(1, 28, 28), torch.tensor([[-50.0, -50.0, 60.0, 60.0]]), (4, 3), 0.5, conventions)
    assert rle == coded(np.ones((4, 3)))


@both_conventions
@pytest.mark.parametrize("box", [[90.0, 90.0, 120.0, 120.0], [-40.0, 2.0, -20.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
@pytest.mark.parametrize("size", [(6, 7), (3000, 2000)])
def test_a_mask_that_sets_no_pixel_is_one_run_of_zeros(box, size, conventions):
    empty = coded(np.zeros(size))
    assert encode_masks(torch.zeros(1, 28, 28), torch.tensor([box]), size, 0.5, conventions) == [empty]
    assert encode_masks(torch.ones(1, 28, 28), torch.tensor([box]), size, 1.01, conventions) == [empty]


@both_conventions
def test_runs_of_a_billion_pixels_are_coded(conventions):
    size, box = (40_000, 50_000), torch.tensor([[49_990.0, 39_990.0, 49_999.0, 39_999.0]])
    (code,) = encode_masks(torch.ones(1, 8, 8), box, size, 0.5, conventions)
    margin = 0 if conventions == "detectron2" else 1
    assert coco_mask.toBbox(code).tolist() == [49_990 - margin, 39_990 - margin, 9 + 2 * margin, 9 + 2 * margin]
    (empty,) = encode_masks(torch.zeros(1, 8, 8), box, size, 0.5, conventions)
    # 2e9 in groups of five bits, written out: pycocotools 2.0.11 gives a run six bytes and writes seven, past its
    # buffer's end.
    assert empty == {"size": list(size), "counts": b"PPU[ck1"}


@both_conventions
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_box_with_a_corner_that_is_not_finite_has_an_empty_mask(value, conventions):
    boxes = torch.tensor([[1.0, 2.0, 9.0, 7.0]]).repeat(5, 1)
    boxes[torch.arange(4), torch.arange(4)] = value
    *empty, whole = encode_masks(torch.ones(5, 8, 8), boxes, (12, 15), 0.5, conventions)
    assert empty == [coded(np.zeros((12, 15)))] * 4
    assert coco_mask.area(whole) > 0


@both_conventions
def test_a_box_that_is_inside_out_has_an_empty_mask(conventions):
    boxes = torch.tensor([[9.0, 2.0, 1.0, 7.0], [1.0, 7.0, 9.0, 2.0], [1.9, 2.0, 1.1, 7.0]])
    assert encode_masks(torch.ones(3, 8, 8), boxes, (12, 15), 0.5, conventions) == [coded(np.zeros((12, 15)))] * 3


@both_conventions
@pytest.mark.parametrize("farthest", [1e6, 1e12, 3e38])
def test_a_box_far_larger_than_any_image_has_the_middle_of_its_mask(farthest, conventions):
    box = torch.tensor([[-farthest, -farthest, farthest, farthest]])
    codes = [
        encode_masks(probs[None], box, (12, 15), 0.5, conventions) for probs in (torch.ones(8, 8), torch.zeros(8, 8))
    ]
    if farthest < 1e30:  # twice the largest is infinite
        assert codes[0] == [coded(np.ones((12, 15)))]
    assert codes[1] == [coded(np.zeros((12, 15)))]


def random_case(seed):
    """Masks and boxes, many of which reach out of the image, and a threshold; every other time that of
    some very pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if seed % 5 == 4 else torch.float32
    num_masks, side = 5 if seed % 20 else 0, [28, 28, 14, 7, 1, 56][seed % 6]
    size = [(37, 53), (160, 141), (1, 230), (225, 1), (97, 260)][seed % 7 % 5]
    extent = torch.tensor([size[1], size[0]], dtype=dtype)
    centre = torch.rand(num_masks, 2, generator=generator, dtype=dtype) * extent
    half_side = torch.rand(num_masks, 2, generator=generator, dtype=dtype) ** 2 * extent * 0.8
    boxes = torch.cat((centre - half_side, centre + half_side), dim=1)
    boxes = boxes.round() if seed % 3 == 0 else boxes
    coarse = torch.rand(max(num_masks, 1), 1, 3, 3, generator=generator, dtype=dtype)
    smooth = F.interpolate(coarse, side, mode="bilinear")[:num_masks, 0]
    noise = torch.rand(num_masks, side, side, generator=generator, dtype=dtype)
    probs = [smooth, noise, (smooth > 0.5).to(dtype), (smooth * 4).round() / 4][seed % 4]
    pasted = paste_masks_in_image(probs[:, None], boxes, size)[:, 0] if num_masks else probs.new_zeros(0, *size)
    threshold = 0.5
    if seed % 2 and pasted.any():
        threshold = pasted[pasted > 0][seed % int((pasted > 0).sum())].item()
    return probs, boxes, size, threshold, pasted


def test_codes_equal_those_of_the_pasted_masks_of_torchvision(seeds):
    for seed in seeds(240):
        probs, boxes, size, threshold, pasted = random_case(seed)
        assert encode_on_whole_pixels(probs, boxes, size, threshold) == [coded(mask > threshold) for mask in pasted]


@only_compiled
def test_compiled_codes_equal_those_of_the_reference(seeds):
    for seed in seeds(240, 480):
        probs, boxes, size, threshold, _ = random_case(seed)
        for conventions in CONVENTIONS:
            codes = encode_masks(probs, boxes, size, threshold, conventions)
            with cuda_ops.backend("reference"):
                assert codes == encode_masks(probs, boxes, size, threshold, conventions), conventions


@only_compiled
def test_codes_of_cuda_equal_those_of_the_pasted_masks_of_torchvision_and_of_plain_torch(seeds, cuda):
    for seed in seeds(60):
        probs, boxes, size, threshold, pasted = random_case(seed)
        codes = encode_on_whole_pixels(probs.to(cuda), boxes.to(cuda), size, threshold)
        assert codes == [coded(mask > threshold) for mask in pasted]
        exact = encode_masks(probs.to(cuda), boxes.to(cuda), size, threshold)
        with cuda_ops.backend("reference"):
            assert exact == encode_masks(probs, boxes, size, threshold)


@only_compiled
def test_codes_of_cuda_equal_those_of_plain_torch_where_columns_outnumber_threads(cuda):
    probs = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[-9.0, -9.0, 800.0, 300.0], [3.0, 5.0, 690.0, 80.0], [400.0, 1.0, 680.0, 33.0]])
    for conventions in CONVENTIONS:
        codes = encode_masks(probs.to(cuda), boxes.to(cuda), (90, 700), 0.5, conventions)
        with cuda_ops.backend("reference"):
            assert codes == encode_masks(probs, boxes, (90, 700), 0.5, conventions), conventions


@only_compiled
@pytest.mark.parametrize("is_exact", [True, False])
def test_torch_knows_enough_of_the_compiled_operator(is_exact):
    args = (torch.rand(2, 7, 7), torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]]), 12, 15, 0.5, is_exact)
    assert set(torch.library.opcheck(torch.ops.cuda_ops.encode_masks.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("size", [(40, 50), (50, 40), (30, 21)])
def test_runs_that_go_on_over_columns_are_one(size):
    """Masks that touch top and bottom, the last pixel, or all four sides."""
    height, width = size
    boxes = torch.tensor([[10.0, -99.0, 20.0, 200.0], [5.0, 5.0, 300.0, 300.0], [-200.0, -200.0, 300.0, 300.0]])
    pasted = paste_masks_in_image(torch.ones(3, 1, 14, 14), boxes, size)[:, 0] > 0.5
    codes = encode_on_whole_pixels(torch.ones(3, 14, 14), boxes, size)
    assert codes == [coded(mask) for mask in pasted]
    assert [int(coco_mask.area(code)) for code in codes] == pasted.sum((1, 2)).tolist()
    assert int(coco_mask.area(codes[2])) == height * width
    exact = encode_masks(torch.ones(3, 14, 14), boxes, size)
    assert exact == [coded(mask >= 0.5) for mask in pasted_by_grid_sample(torch.ones(3, 14, 14), boxes, size)]
    assert [int(coco_mask.area(exact[k])) for k in (0, 2)] == [10 * height, height * width]


def test_runs_of_tens_of_billions_of_pixels_are_written_whole():
    """In an image of 4e10 pixels: one run takes eight characters."""
    codes = encode_masks(
        torch.stack((torch.zeros(4, 4), torch.ones(4, 4))), torch.tensor([[3.0, 5.0, 7.0, 9.0]] * 2), (200_000,) * 2
    )
    runs = [[4 * 10**10], [600_005, 4, 199_996, 4, 199_996, 4, 199_996, 4, 4 * 10**10 - 1_200_009]]
    assert [numbers_of(code["counts"]) for code in codes] == runs


def numbers_of(text):
    """Lengths of runs from COCO's text, by Python's integers."""
    numbers, number, shift = [], 0, 0
    for character in text:
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) if bits & 16 else 0
            numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
            number, shift = 0, 0
    return numbers


def test_no_detections_have_no_codes():
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 5)) == []


def test_strides_of_scores_and_boxes_do_not_matter():
    probs, boxes = torch.rand(2, 8, 8), torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]])
    strided = probs.permute(2, 1, 0).contiguous().permute(2, 1, 0), boxes.t().contiguous().t()
    for conventions in CONVENTIONS:
        assert encode_masks(*strided, (12, 15), 0.5, conventions) == encode_masks(
            probs, boxes, (12, 15), 0.5, conventions
        )


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_scores_and_boxes_may_differ_in_precision(dtypes):
    probs = (torch.rand(2, 8, 8) > 0.4).to(dtypes[0])
    boxes = torch.tensor([[1.0, 2.0, 9.0, 7.0], [0.0, 0.0, 20.0, 20.0]], dtype=dtypes[1])
    pasted = paste_masks_in_image(probs[:, None], boxes, (12, 15))[:, 0]
    assert encode_on_whole_pixels(probs, boxes, (12, 15)) == [coded(mask > 0.5) for mask in pasted]
    assert encode_masks(probs, boxes, (12, 15)) == encode_masks(probs.double(), boxes.double(), (12, 15))


@both_conventions
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_score_that_is_no_number_does_no_harm(value, conventions):
    probs, boxes = torch.rand(2, 8, 8), torch.tensor([[1.0, 2.0, 9.0, 7.0]]).repeat(2, 1)
    probs[0, 2:5, 3] = value
    code, unharmed = encode_masks(probs, boxes, (12, 15), 0.5, conventions)
    assert coco_mask.decode(code).shape == (12, 15)
    assert [unharmed] == encode_masks(probs[1:], boxes[1:], (12, 15), 0.5, conventions)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask_probs": torch.rand(3, 4, 5)}, r"mask_probs must be \[D, M, M\] float, got \[3, 4, 5\]"),
        ({"mask_probs": torch.rand(2, 4, 4)}, r"boxes must be 2 as mask_probs, got 3"),
        ({"image_size": (9, 0)}, r"image_size must be positive, got \(9, 0\)"),
        ({"image_size": (9.0, 9)}, r"image_size must be whole, got \(9.0, 9\)"),
        ({"conventions": "torchvison"}, r"conventions must be detectron2 or torchvision, got 'torchvison'$"),
        ({"conventions": "Detectron2"}, r"conventions must be detectron2 or torchvision, got 'Detectron2'$"),
        ({"conventions": ""}, r"conventions must be detectron2 or torchvision, got ''$"),
    ],
)
def test_wrong_input_is_named(wrong, message):
    right = {"mask_probs": torch.rand(3, 4, 4), "boxes": torch.zeros(3, 4), "image_size": (9, 9)}
    with pytest.raises(ValueError, match=f"^encode_masks: {message}"):
        encode_masks(**right | wrong)
