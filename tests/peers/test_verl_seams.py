"""verl with its functions replaced by ours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap

import fastrlhf
import pytest
import torch
from fastrlhf import integrations
from fastrlhf.integrations.hosts.verl import HOST

from tests.integrations.test_patching import everything, same

from . import seams

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
functional = pytest.importorskip("verl.utils.torch_functional")


@pytest.mark.parametrize("sizes", seams.SIZES, ids=str)
@pytest.mark.parametrize("name", seams.names(HOST))
def test_equal(name, sizes):
    if sizes.rows == 1 and "reinforce" in name:
        pytest.skip("the host needs two")
    if sizes.dtype == torch.bfloat16 and "REGISTRY" in name:
        pytest.skip("made of log-probs, which are float32")
    seams.check(HOST, name, sizes)


def test_live_and_left_as_it_was():
    importlib.import_module("verl.workers.utils.losses")
    importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    importlib.import_module("verl.utils.experimental.torch_functional")
    before = everything("verl")
    report = integrations.patch("verl", quiet=True)
    try:
        missing = {s.seam: s.note for s in report.seams if s.state == "not live"}
        assert all("linear_logprobs is not in this build" in note for note in missing.values()), missing
        assert len(report.live) >= 27
        losses = sys.modules["verl.workers.utils.losses"]
        assert losses.kl_penalty is core_algos.kl_penalty and core_algos.kl_penalty.__fastrlhf__
        assert core_algos.get_adv_estimator_fn("gae") is core_algos.compute_gae_advantage_return
        assert core_algos.get_adv_estimator_fn("rloo").__fastrlhf__
    finally:
        integrations.unpatch("verl")
    assert same(before, everything("verl"))


def test_compiled_entropy():
    """verl's engines compile what they find under this name."""
    replacement = next(s for s in HOST.seams if s.name.endswith(".entropy_from_logits")).build(functional.entropy_from_logits)
    compiled = torch.compile(replacement, dynamic=True, backend="eager", fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(rows, 50, requires_grad=True)
        torch.testing.assert_close(compiled(x), functional.entropy_from_logits(x))
        compiled(x).sum().backward()


def test_host_defects():
    """What docs/integrations.md says of verl's own functions."""
    x = (torch.randn(64, 32000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    exact = fastrlhf.logprobs(x.double(), torch.zeros(64, dtype=torch.long), entropy=True, backend="reference").entropy
    theirs = (functional.entropy_from_logits(x).double() - exact).abs().max()
    ours = (patching_entropy()(x).double() - exact).abs().max()
    assert theirs > 2 * ours and ours <= 2**-7 * exact.max()
    x = torch.randn(2, 8)
    x[:, 0] = -torch.inf
    assert functional.entropy_from_logits(x).isnan().all() and patching_entropy()(x).isfinite().all()


def patching_entropy():
    return next(s for s in HOST.seams if s.name.endswith(".entropy_from_logits")).build(functional.entropy_from_logits)


def run(script: str, path=(), **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VERL_USE")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300,
        env=clean | {"PYTHONPATH": os.pathsep.join([*map(str, path), *sys.path])} | env,
    )  # fmt: skip


CHECK = """
import verl
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
assert core_algos.compute_gae_advantage_return.__fastrlhf__
assert torch_functional.masked_mean.__fastrlhf__
assert "fastrlhf_ppo" in core_algos.POLICY_LOSS_REGISTRY
print("live")
"""


def test_import_verl_alone_is_enough(tmp_path):
    """Where an installed fastrlhf has the entry point; the log says so at INFO."""
    info = tmp_path / "aplugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aplugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nfastrlhf = fastrlhf.integrations.verl\n")
    done = run(CHECK, [tmp_path])
    assert done.returncode == 0 and done.stdout.strip().endswith("live"), done.stderr
    assert "INFO" in done.stderr and "seams live" in done.stderr, done.stderr
    assert "verl.trainer.ppo.core_algos.compute_gae_advantage_return" in done.stderr


def test_external_modules():
    done = run(CHECK, VERL_USE_EXTERNAL_PLUGINS="none", VERL_USE_EXTERNAL_MODULES="fastrlhf.integrations.verl")
    assert done.returncode == 0 and done.stdout.strip().endswith("live"), done.stderr
    assert "seams live" in done.stderr


def test_a_late_module_goes_live_when_it_is_imported(tmp_path):
    """With a stand-in for the op where this build has none: the seam's own code is what is tested."""
    done = run(
        """
        import sys, torch
        from fastrlhf import ops, integrations
        if not hasattr(ops, "linear_logprobs"):
            def linear_logprobs(hidden, weight, labels, *, bias=None, temperature=1.0, softcap=None, entropy=False, **_):
                z = hidden.float() @ weight.float().t()
                if bias is not None:
                    z = z + bias.float()
                return ops.logprobs(z, labels, temperature=temperature, softcap=softcap, entropy=entropy)
            ops.linear_logprobs = linear_logprobs
        report = integrations.patch("verl", quiet=True)
        assert "verl.utils.experimental.torch_functional" not in sys.modules
        from verl.utils.experimental.torch_functional import FusedLinearForPPO, FusedLinearForPPOFunction
        assert FusedLinearForPPOFunction.__fastrlhf__
        lp, h = FusedLinearForPPO()(torch.randn(5, 8, requires_grad=True), torch.randn(30, 8), torch.arange(5))
        lp.sum().backward()
        print("live")
        """,
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("live"), done.stderr
    assert "FusedLinearForPPOFunction: live" in done.stderr


def test_vocabulary_over_two_ranks(tmp_path):
    """verl's vocab-parallel functions and ours on two ranks, with a stand-in for the megatron-core that they import."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "__init__.py").write_text("")
    (tmp_path / "megatron" / "core" / "__init__.py").write_text("from . import parallel_state, tensor_parallel\n")
    (tmp_path / "megatron" / "core" / "parallel_state.py").write_text(
        "import torch.distributed as dist\ndef get_tensor_model_parallel_group():\n    return dist.group.WORLD\n"
    )
    (tmp_path / "megatron" / "core" / "tensor_parallel.py").write_text(
        "def vocab_parallel_cross_entropy(vocab_parallel_logits, target):\n    raise AssertionError('not to be called')\n"
    )
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        torch.compile = lambda f=None, **_: f if f else (lambda g: g)
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        import verl.utils.megatron.tensor_parallel as tp
        theirs_entropy = tp.vocab_parallel_entropy
        from fastrlhf import integrations
        report = integrations.patch("verl", quiet=True)
        assert tp.vocab_parallel_entropy.__fastrlhf__, report
        whole = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 3
        y = torch.randint(0, 40, (7,), generator=torch.Generator().manual_seed(1))
        shard = whole[:, rank * 20 : rank * 20 + 20]
        a, b = shard.clone().requires_grad_(), shard.clone().requires_grad_()
        first, second = theirs_entropy(a * 1.0), tp.vocab_parallel_entropy(b)
        torch.testing.assert_close(second, first)
        first.sum().backward(), second.sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
        c, full = shard.clone().requires_grad_(), whole.clone().requires_grad_()
        lp = tp.vocab_parallel_log_probs_from_logits(c, y)
        exact = torch.log_softmax(full, -1).gather(-1, y[:, None])[:, 0]
        torch.testing.assert_close(lp, exact)
        lp.sum().backward(), exact.sum().backward()
        torch.testing.assert_close(c.grad, full.grad[:, rank * 20 : rank * 20 + 20], rtol=1e-4, atol=1e-6)
        wide = shard.view(1, 7, 20)
        torch.testing.assert_close(tp.vocab_parallel_entropy_with_chunking(wide), second.detach().view(1, 7))
        print("equal")
    """)
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]), OMP_NUM_THREADS="1")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(r), str(tmp_path / "store")], env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    for r in ranks:
        out, err = r.communicate(timeout=300)
        assert r.returncode == 0 and "equal" in out, err
