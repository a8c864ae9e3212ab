"""Ways to break predictions, cuts and efficiency settings, for ``tests.laws.break_the_laws``.

Each: the rule, what is broken, file, changes, tests.
"""

from __future__ import annotations

EFFICIENCY, MEMORY = "efficiency", "memory"

MUTANTS: list[tuple[str, str, str, dict[str, str], list[str]]] = [
    (
        EFFICIENCY,
        "slices draw their own random numbers",
        "localfeat/efficiency/slices.py",
        {"if func is not Tensor.bernoulli_:": "if True:"},
        ["tests/unit/efficiency/test_recompute.py"],
    ),
    (
        EFFICIENCY,
        "autocast is lost when blocks are recomputed in slices",
        "localfeat/efficiency/slices.py",
        {"with self.autocast.restored(), rows:": "with rows:"},
        ["tests/unit/efficiency/test_recompute.py"],
    ),
    (
        EFFICIENCY,
        "running statistics are updated twice",
        "localfeat/efficiency/recompute.py",
        {"            norm._buffers.update(buffers)": "            pass"},
        ["tests/unit/efficiency/test_recompute.py"],
    ),
    (
        EFFICIENCY,
        "the backward pass of fused attention forgets the mask",
        "localfeat/efficiency/window_attention.py",
        {
            "            probabilities = _probabilities(q, k, bias, mask)\n": (
                "            probabilities = _probabilities(q, k, bias, None)\n"
            )
        },
        ["tests/unit/efficiency/test_window_attention.py"],
    ),
    (
        EFFICIENCY,
        "fused attention has no effect",
        "localfeat/learner/assembly.py",
        {"fuse_window_attention(backbone)": "pass"},
        ["tests/unit/efficiency/test_efficiency.py", "tests/unit/efficiency/test_window_attention.py"],
    ),
    (
        MEMORY,
        "cuts are balanced without the persistent memory of auxiliary parts",
        "localfeat/memory/balance.py",
        {"candidate = (limit + persistent, squares, cuts)": "candidate = (limit, squares, cuts)"},
        ["tests/unit/memory/test_balance.py"],
    ),
    (
        MEMORY,
        "gradients of a module are not counted while it goes backward",
        "localfeat/memory/pieces.py",
        {"        gradients += piece.gradients": "        pass"},
        ["tests/unit/memory/test_module_costs.py"],
    ),
    (
        MEMORY,
        "predictions ignore autocast",
        "localfeat/memory/emulation.py",
        {"return value.to(dtype) if _is_eligible(value) else value": "return value"},
        ["tests/unit/memory/test_emulation.py"],
    ),
    (
        MEMORY,
        "a prediction forgets the optimizer's states",
        "localfeat/memory/accounting.py",
        {"        step.run(updates=True)\n": ""},
        ["tests/unit/memory/test_accounting.py"],
    ),
    (
        MEMORY,
        "every module's window goes to the module after it",
        "localfeat/memory/windows.py",
        {"self._end_window()\n        self._current": "pass\n        self._current"},
        ["tests/unit/run/test_module_peaks.py"],
    ),
]
