"""Vision transformers: equal to MONAI's on copied weights; tokens that are left out; places; decoders of tokens."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.branches import BranchStream, draw_branches
from brainfm.nets.decoders import SkipDecoder, decoder_for
from brainfm.nets.transformer import TransformerBlock, turned, turns
from brainfm.nets.vit import TokenDecoder, ViT
from tests.nets.test_resenc import formula

SMALL = {"width": 48, "depth": 4, "heads": 2, "patch_vox": 8, "grid_vox": [32, 16, 24]}


def small(**options) -> ViT:
    torch.manual_seed(0)
    return build_backbone("vit", **(SMALL | options)).eval()


def image(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 1, 32, 16, 24)))


def cubes(gone: Tensor, edge: int = 8) -> Tensor:
    """bool [B, x, y, z] -> the voxels [B, 1, X, Y, Z] of these cubes."""
    for axis in (1, 2, 3):
        gone = gone.repeat_interleave(edge, axis)
    return gone[:, None]


@pytest.mark.parametrize(("size", "millions"), [("s", 22.9), ("b", 88.4), ("l", 306.7)])
def test_sizes_are_the_published_ones(size: str, millions: float) -> None:
    with torch.device("meta"):
        net = build_backbone(f"vit_{size}")
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def theirs_of(net: ViT) -> dict[str, Tensor]:
    """The tensors of ours by MONAI's names; keys have a bias of 0 there."""
    state = {
        "cls_token": net.embed.loose,
        "patch_embedding.position_embeddings": net.embed.places.flatten(2).transpose(1, 2),
        "patch_embedding.patch_embeddings.weight": net.embed.patches.weight,
        "patch_embedding.patch_embeddings.bias": net.embed.patches.bias,
        "norm.weight": net.norm.weight,
        "norm.bias": net.norm.bias,
    }
    for number, layer in enumerate(net.layers):
        own = {
            "norm1": layer.norm_attend, "norm2": layer.norm_think, "attn.out_proj": layer.attend.out,
            "mlp.linear1": layer.think[0], "mlp.linear2": layer.think[2],
        }  # fmt: skip
        state |= {f"blocks.{number}.{n}.{k}": v for n, part in own.items() for k, v in part.named_parameters()}
        bias = torch.cat([layer.attend.q_bias, torch.zeros_like(layer.attend.q_bias), layer.attend.v_bias])
        state |= {f"blocks.{number}.attn.qkv.weight": layer.attend.qkv.weight, f"blocks.{number}.attn.qkv.bias": bias}
    return state


def by_formula(net: ViT) -> ViT:
    """Values that depend on MONAI's names alone (see test_resenc.formula)."""
    with torch.no_grad():
        for theirs, ours in theirs_of(net).items():
            wanted = formula(
                theirs.replace("norm1.weight", "norm.weight").replace("norm2.weight", "norm.weight"), ours.shape
            )
            if theirs == "patch_embedding.position_embeddings":
                net.embed.places.copy_(wanted.transpose(1, 2).unflatten(2, net.embed.places.shape[2:]))
            elif theirs.endswith("qkv.bias"):
                layer = net.layers[int(theirs.split(".")[1])]
                layer.attend.q_bias.copy_(wanted.chunk(3)[0])
                layer.attend.v_bias.copy_(wanted.chunk(3)[2])
            else:
                ours.copy_(wanted)
    return net


def test_values_are_those_of_monai() -> None:
    """Of MONAI 1.6's ViT, whose weights and image are by ``formula``: the class token, and the map in one place."""
    reference = json.loads((Path(__file__).parent / "vit_reference.json").read_text())
    with torch.no_grad():
        maps, whole = by_formula(small()).summarised(formula("image", (1, 1, 32, 16, 24)))
    torch.testing.assert_close(whole[0], torch.tensor(reference["class"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps[0][0, :, 2, 1, 1], torch.tensor(reference["place"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_cubes_left_out_are_not_computed_and_change_nothing(positions: str) -> None:
    """The kept tokens are those of a transformer that was never given the others, a sample at a time."""
    net = small(positions=positions, registers=1)
    gone = torch.rand(2, 4, 2, 3) < 0.6
    gone[0, 0, 0, 0], gone[1, 0, 0, 0] = False, False
    assert gone[0].sum() != gone[1].sum()  # samples of unequal length share a batch
    with torch.no_grad():
        maps = net.features_masked(image(), cubes(gone))
        for one in range(2):
            tokens = net.embed(image()[one : one + 1]).flatten(2).transpose(1, 2)[:, ~gone[one].flatten()]
            tokens = torch.cat([net.embed.loose, tokens], 1)
            angles = turns((4, 2, 3), 24, torch.device("cpu"))
            kept = tuple(turn[~gone[one].flatten()] for turn in angles) if positions == "rotary" else None
            for layer in net.layers:
                tokens = layer(tokens, kept)
            expected = net.norm(tokens)[0, 2:]
            found = maps[0][one].flatten(1).t()
            torch.testing.assert_close(found[~gone[one].flatten()], expected, atol=1e-5, rtol=1e-4)
            assert not found[gone[one].flatten()].any()


def test_the_encoder_costs_what_it_sees() -> None:
    net = small()
    whole = image(1, 1, 64, 64, 64)
    gone = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    gone[:, 2:] = True
    costs = []
    for hidden in (torch.zeros_like(whole, dtype=torch.bool), cubes(gone)):
        with FlopCounterMode(display=False) as counted:
            net.features_masked(whole, hidden)
        costs.append(counted.get_total_flops())
    assert costs[1] < 0.45 * costs[0]  # a quarter of the tokens; the cubes themselves are all embedded


def test_a_hidden_cube_that_is_replaced_has_an_answer_of_its_place() -> None:
    net = small()
    gone = torch.zeros(2, 4, 2, 3, dtype=torch.bool)
    gone[:, 1, 1, :2] = True
    with torch.no_grad():
        maps, whole = net.summarised(image(), cubes(gone))
        other, other_whole = net.summarised(image().masked_fill(cubes(gone), 5.0), cubes(gone))
    assert torch.equal(maps[0], other[0]) and torch.equal(whole, other_whole)
    assert not torch.allclose(maps[0][:, :, 1, 1, 0], maps[0][:, :, 1, 1, 1])


def test_a_scan_without_a_visible_cube_has_finite_maps() -> None:
    hidden = torch.ones(2, 1, 32, 16, 24, dtype=torch.bool)
    hidden[0, :, :8, :8, :8] = False
    assert torch.isfinite(small().features_masked(image(), hidden)[0]).all()


def test_rotary_places_tell_distance_alone() -> None:
    """Scores of turned queries and keys depend on how far the tokens are apart, not on where they are."""
    query, key = torch.randn(24), torch.randn(24)
    by = turns((6, 5, 4), 24, torch.device("cpu"))
    heads = turned(torch.stack([query, key])[:, None, None].expand(2, 1, 120, 24), by)
    scores = (heads[0, 0] @ heads[1, 0].t()).view(6, 5, 4, 6, 5, 4)
    torch.testing.assert_close(scores[0, 0, 0, 2, 1, 3], scores[3, 3, 0, 5, 4, 3])
    assert abs(scores[0, 0, 0, 2, 1, 3] - scores[0, 0, 0, 1, 2, 3]) > 1e-3


def test_maps_of_several_depths_and_a_decoder_that_lifts_them() -> None:
    net = small(taps=4)
    maps = net(image())
    assert net.strides == (8,) * 4 and [m.shape for m in maps] == [(2, 48, 4, 2, 3)] * 4
    torch.testing.assert_close(maps[-1], small(taps=1)(image())[0])
    decoder = decoder_for(net, 3)
    assert [m.shape[2] for m in decoder.climb(maps)] == [8, 16, 32]
    decoder(maps).sum().backward()
    assert decoder(maps).shape == (2, 3, 32, 16, 24)
    assert all(p.grad is not None for p in [*decoder.parameters(), *net.parameters()])
    assert not SkipDecoder((4, 8), (1, 2), 2).lifts and not SkipDecoder((8,), (8,), 2).lifts


def test_latents_of_tokens_are_decoded_by_attention() -> None:
    net = small()
    decoder = decoder_for(net, 2, latent_channels=10)
    assert isinstance(decoder, TokenDecoder)
    latents = torch.randn(2, 10, 4, 2, 3)
    whole = decoder(latents)
    assert whole.shape == (2, 2, 32, 16, 24)
    latents[0, :, 3, 1, 2] += 1  # a far token changes the first cube
    assert not torch.allclose(decoder(latents)[0, :, :8, :8, :8], whole[0, :, :8, :8, :8])


def test_cubes_of_the_decoder_are_laid_where_their_tokens_are() -> None:
    decoder = TokenDecoder(4, 48, 1, 0, 8)
    with torch.no_grad():
        for value in decoder.parameters():
            value.normal_()
        latents = torch.randn(1, 4, 2, 3, 2)
        whole = decoder(latents)
        alone = decoder.out(decoder.norm(decoder.enter(latents[0, :, 1, 2, 0]))).view(8, 8, 8)
    torch.testing.assert_close(whole[0, 0, 8:, 16:, :8], alone)


def test_dropped_branches_are_dropped_in_training_alone_and_keep_the_mean() -> None:
    block, tokens = TransformerBlock(8, 1, 16, drop=0.5), torch.randn(400, 1, 8)
    kept = BranchStream(3, range(400)).draw(400, [0.5])[0]
    assert (kept.float().mean(1) > 0.4).all() and (kept.float().mean(1) < 0.6).all()
    with torch.no_grad():
        weighed = block._weighed(tokens, None, kept[0])
    torch.testing.assert_close(weighed, tokens * 2 * kept[0][:, None, None])
    net = small(drop_path=0.5).eval()
    scan = image()
    draw_branches(net, 0, torch.arange(len(scan)))
    with torch.no_grad():
        whole = net.features(scan)[-1]
        assert torch.equal(net.features(scan)[-1], whole)
        assert not torch.equal(net.train().features(scan)[-1], whole)


def test_a_sample_drops_the_same_branches_in_any_batch_and_others_in_another_pass_or_copy() -> None:
    shares = [0.0, *[0.5] * 30]
    stream = BranchStream(3, [7, 8])
    first, second = stream.draw(4, shares), stream.draw(4, shares)
    alone = BranchStream(3, [8])
    assert torch.equal(alone.draw(2, shares), first[:, :, 1::2])
    assert torch.equal(alone.draw(1, shares)[:, :, 0], second[:, :, 1])
    assert first[0].all() and not torch.equal(first[:, :, 1], first[:, :, 3])
    assert not torch.equal(first, second) and not torch.equal(first[:, :, 0], first[:, :, 1])
    before = torch.random.get_rng_state()
    stream.draw(4, shares)
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own stream is left alone


def test_recomputed_gradients_are_the_same() -> None:
    gradients = []
    for checkpointing in (False, True):
        net = small(registers=1).train()
        net.checkpointing = checkpointing
        net(image())[-1].square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"heads": 5}, "even number of channels"),
        ({"positions": "none"}, "learned or rotary"),
        ({"grid_vox": [30, 16, 16]}, "three multiples of 8"),
        ({"registers": -1}, "registers >= 0"),
        ({"taps": 5}, "expected 1 to 4"),
        ({"name_": "x"}, "unknown key"),
    ],
)
def test_refusals(config: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_backbone("vit", **(SMALL | config))
