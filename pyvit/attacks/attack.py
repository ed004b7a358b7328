"""The attack loop that every rule shares, and the conventions of all attacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from pyvit.attacks.batch import Batch, Counts, Run
from pyvit.attacks.graph import Graphs, opened
from pyvit.attacks.losses import LOSSES, at_least_float32
from pyvit.attacks.model_state import borrowed, global_random_state
from pyvit.attacks.progress import progress_bar
from pyvit.attacks.targets import (
    Targeted,
    check_classes,
    check_labels,
    check_targeted,
    choose_targets,
)
from pyvit.ops import _checks
from pyvit.ops.projected_step import check_bounds

Loss = Callable[[Tensor, Tensor], Tensor]


class Attack:
    """Base of all rules: ``adv = attack(images, labels)``.

    A rule says how many ``steps`` it takes, where an image starts (``begin``) and how it moves
    (``move``); this class does the rest. It leaves the model as it found it, also when something
    raised half-way: parameters, their ``.grad`` and ``requires_grad``, each module's train or
    eval mode, buffers (batch norm's statistics). It differentiates with respect to the images
    alone. With a ``generator`` the global random state stays as it was, too.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]`` (not probabilities). A model that
            wants normalised input: ``pyvit.attacks.normalized``.
        bounds: lowest and highest value of a pixel.
        targeted: False: away from the labels. True: the labels given are the targets. "random",
            "least_likely" (of the clean prediction, fixed once) or a function
            ``(images, labels) -> targets``: the labels given are the true ones, and the targets
            are chosen from the other classes.
        loss: "cross_entropy", "margin" (of logits, after Carlini & Wagner) or a function
            ``(logits, labels) -> [B]``. Losses are summed, not averaged, over the batch, so that
            an image's gradient depends neither on the batch's size nor on its other images, as far
            as the model's layers keep to that.
        restarts: runs from different random starts; each image keeps the run that fooled the
            model or, if none or several did, that with the best loss.
        early_stop: an image leaves the batch once it fools the model, and the rest goes on as a
            smaller batch: much faster where only success counts; its perturbation is then the
            first that works, not the strongest. With restarts, only images that still resist
            are tried again.
        model_mode: "eval" puts every module in eval mode for the attack; "keep" leaves the modes
            as they are.
        generator: for random starts and targets, on the images' device; None: the global one.
        progress: show a progress bar where tqdm is installed.
        graph: True or None: steps run as CUDA graphs, recorded once for each batch size, then
            replayed without Python, which saves the time in which the GPU waits for it; the same
            images. A model that cannot be recorded (it waits for the GPU or draws random numbers
            on the host within a step) is refused with NotImplementedError by True; with None, it
            is attacked without graphs after a warning that says why, as is one whose hooks a
            replay would skip, and silently where the images are not on a GPU or the steps too few
            to pay for a recording (9). False: never. The first 3 steps at each batch size are
            ordinary ones. Python code of the model and of a loss function does not run in a
            replay: what it decides must be the same in each step. Costs the memory of a step until
            the call ends; see ``keep_graphs`` for several calls. With ``early_stop`` batches
            halve, rather than shrink by every finished image.
        autocast: torch.bfloat16 or torch.float16: the model runs under ``torch.autocast`` of that
            dtype, forward and backward; logits and loss are in float32. None: as the caller has
            set it. Parameters are cast at each step; a model that is itself of that dtype saves
            this. In float16 the gradient of a model that is sure of an image may be all zero.
    """

    steps: int

    # A rule declares this where each call of ``move`` does the same on ``batch``'s tensors:
    # nothing is read on the host, no attribute changes, and what changes is in ``batch.rule``, of
    # the same names, shapes and dtypes before and after. A class that overrides ``move`` declares
    # it anew.
    replayable: ClassVar[bool] = False

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        targeted: Targeted = False,
        loss: str | Loss = "cross_entropy",
        restarts: int = 1,
        early_stop: bool = False,
        model_mode: str = "eval",
        generator: torch.Generator | None = None,
        progress: bool = False,
        graph: bool | None = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.op = f"attacks.{type(self).__name__}"
        if not callable(model):
            _checks.fail(TypeError, self.op, "model", "callable", type(model).__name__)
        check_targeted(self.op, targeted)
        if not callable(loss):
            _checks.choice(self.op, "loss", loss, tuple(LOSSES))
        _checks.choice(self.op, "model_mode", model_mode, ("eval", "keep"))
        if generator is not None and not isinstance(generator, torch.Generator):
            got = type(generator).__name__
            _checks.fail(TypeError, self.op, "generator", "a torch.Generator or None", got)
        if graph is not None and not isinstance(graph, bool):
            got = type(graph).__name__
            _checks.fail(TypeError, self.op, "graph", "True, False or None", got)
        _checks.choice(self.op, "autocast", autocast, (None, torch.bfloat16, torch.float16))
        self.model = model
        self.bounds = check_bounds(self.op, bounds)
        self.targeted = targeted
        self.loss: Loss = loss if callable(loss) else LOSSES[loss]
        self.restarts = _checks.integer(self.op, "restarts", restarts, minimum=1)
        self.early_stop = _checks.flag(self.op, "early_stop", early_stop)
        self.model_mode = model_mode
        self.generator = generator
        self.progress = _checks.flag(self.op, "progress", progress)
        self.graph = graph
        self.autocast = autocast
        self.lengths: dict[str, float | Tensor] = {}
        self._no_graphs: str | None = None  # why, once that is known
        self._keeps_graphs = False
        self._kept: Graphs | None = None

    # ---- the rule ---------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """Set ``batch.x`` to the start (it is the clean images so far); add to ``batch.rule``."""

    def move(self, batch: Batch, grad: Tensor) -> Tensor:
        """The images after one step; ``grad`` is that of the summed loss at ``batch.x``."""
        raise NotImplementedError

    # ---- one call ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def keep_graphs(self) -> Iterator[None]:
        """Keep the CUDA graphs of calls for later calls inside ``with attack.keep_graphs():``.

        They are used again for batches of the same size, layout and dtype, and recorded anew
        where the model's modules, modes, parameters' or buffers' places in memory, or the
        attack's settings are others. Values of parameters and buffers may change in place, as an
        optimizer changes them. What else the model's code depends on (a number that it keeps as
        an attribute, a schedule) must not change: a replay would not see it. The memory of the
        graphs is held until the end.
        """
        self._keeps_graphs = True
        try:
            yield
        finally:
            self._keeps_graphs = False
            graphs, self._kept = self._kept, None
            if graphs is not None:
                graphs.close()

    @overload
    def __call__(
        self, images: Tensor, labels: Tensor | None = ..., *, return_counts: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def __call__(
        self, images: Tensor, labels: Tensor | None = ..., *, return_counts: Literal[True]
    ) -> tuple[Tensor, Counts]: ...

    def __call__(
        self, images: Tensor, labels: Tensor | None = None, *, return_counts: bool = False
    ) -> Tensor | tuple[Tensor, Counts]:
        """Adversarial images for ``images`` ``[B, ...]``, within the bounds.

        Args:
            images: clean images within the bounds; any floating dtype, any layout.
            labels: ``[B]`` classes. None: the clean prediction, which also avoids that an attack
                gives the true label away.
            return_counts: return ``(adversarial images, Counts)``.
        """
        self._check_images(images)
        if labels is not None:
            check_labels(self.op, "labels", labels, len(images), images.device)
        elif self.targeted is True:
            _checks.fail(ValueError, self.op, "labels", "the targets", None)
        keep_random_state = self.generator is not None
        counts = Counts()
        with (
            global_random_state(images.device, kept=keep_random_state),
            torch.inference_mode(False),
            torch.enable_grad(),
            borrowed(self.model, evaluating=self.model_mode == "eval"),
            progress_bar(self.op, self.steps * self.restarts, self.progress) as bar,
            opened(self, images) as graphs,
        ):
            # Autograd refuses images that were made in inference mode; a copy is an ordinary one.
            images = images.detach().clone()
            labels = None if labels is None else labels.detach().clone().long()
            adversarial = images
            if len(images) > 0:
                labels = self._labels(images, labels, counts)
                adversarial = self._with_restarts(images, labels, counts, bar, graphs)
        if graphs is not None:
            graphs.capture.hand_over(adversarial)
        return (adversarial, counts) if return_counts else adversarial

    def _labels(self, images: Tensor, labels: Tensor | None, counts: Counts) -> Tensor:
        """True classes, or the targets."""
        chooses = not isinstance(self.targeted, bool)
        if labels is not None and not chooses:
            return labels
        with torch.no_grad():
            logits = self._logits(images, counts)
        if labels is None:
            labels = logits.argmax(1)
        check_classes(self.op, "labels", labels, logits.shape[1])
        if isinstance(self.targeted, bool):
            return labels
        how, generator = self.targeted, self.generator
        return choose_targets(self.op, how, images, labels, logits, generator)

    def _with_restarts(
        self, images: Tensor, labels: Tensor, counts: Counts, bar: Any, graphs: Graphs | None
    ) -> Tensor:
        everyone = torch.arange(len(images), device=images.device)
        batch = Batch(index=everyone, x0=images, x=images, labels=labels)
        best = self._attack(batch, counts, bar, graphs)
        if self.restarts == 1:
            return best
        fooled, score = self._judge(best, labels, counts)
        for _ in range(self.restarts - 1):
            again = ~fooled if self.early_stop else torch.ones_like(fooled)
            if not bool(again.any()):
                break
            places = everyone[again]
            tried = self._attack(batch.keep(again), counts, bar, graphs)
            fools, scores = self._judge(tried, labels[places], counts)
            same = fools == fooled[places]
            better = (fools & ~fooled[places]) | (same & (scores > score[places]))
            places = places[better]
            best[places], fooled[places] = tried[better], fools[better]
            score[places] = scores[better]
        return best

    def _judge(self, images: Tensor, labels: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
        """Whether each image fools the model, and the loss as the attack sees it."""
        with torch.no_grad():
            logits = self._logits(images, counts)
            losses = self._losses(logits, labels)
        return self._fools(logits, labels), losses if self.targeted is False else -losses

    def _attack(self, batch: Batch, counts: Counts, bar: Any, graphs: Graphs | None) -> Tensor:
        """One run from one start: the adversarial images, one for each of the batch."""
        batch = replace(batch, rule=self._lengths_of(batch))
        self.begin(batch)
        rows = torch.arange(len(batch.x), device=batch.x.device)
        run = Run(batch, rows, batch.x.clone() if self.early_stop else None)
        while run.step < self.steps and len(run.rows) > 0:
            if graphs is None or not graphs.advance(run, counts, bar):
                self._step(run, counts)
                bar.update(1)
        bar.update(self.steps - run.step)
        return run.result()

    def _step(self, run: Run, counts: Counts) -> None:
        batch = run.batch
        x = batch.x.detach().requires_grad_()
        logits = self._logits(x, counts)
        if run.step == 0:
            check_classes(self.op, "labels", batch.labels, logits.shape[1])
        run.step += 1
        alive = None
        if run.finished is not None:
            fools = self._fools(logits, batch.labels)
            if bool(fools.any()):
                alive = ~fools
                run.finished[run.rows[fools]] = batch.x[fools]
                run.rows = run.rows[alive]
                if len(run.rows) == 0:
                    return
        grad = self._gradient(x, logits, batch.labels, alive, counts)
        if alive is not None:
            run.batch = batch = batch.keep(alive)
            grad = grad[alive]
        batch.x = self.move(batch, grad)

    # ---- what the loop is made of -----------------------------------------------------------

    def _logits(self, x: Tensor, counts: Counts) -> Tensor:
        counts.forwards += len(x)
        if self.autocast is None:
            logits = self.model(x)
        else:
            # Nothing is cached: the parameters are frozen, and autocast caches casts of leaves.
            with torch.autocast(x.device.type, self.autocast, cache_enabled=False):
                logits = self.model(x)
        if not isinstance(logits, Tensor):
            wanted = "a function of images alone that returns logits"
            got = f"a {type(logits).__name__} from it (wrap the model)"
            _checks.fail(TypeError, self.op, "model", wanted, got)
        if logits.dim() != 2 or logits.shape[0] != len(x):
            wanted = f"one that returns logits of shape ({len(x)}, classes)"
            _checks.fail(ValueError, self.op, "model", wanted, _checks.shape_of(logits))
        return logits if self.autocast is None else at_least_float32(logits)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = self.loss(logits, labels)
        if not isinstance(losses, Tensor) or losses.shape != labels.shape:
            got = _checks.shape_of(losses) if isinstance(losses, Tensor) else repr(losses)
            wanted = f"one that returns one loss an image, shape {tuple(labels.shape)}"
            _checks.fail(ValueError, self.op, "loss", wanted, got)
        return losses

    def _gradient(
        self, x: Tensor, logits: Tensor, labels: Tensor, alive: Tensor | None, counts: Counts
    ) -> Tensor:
        losses = self._losses(logits, labels)
        if alive is not None:
            losses = losses[alive]
        if not losses.requires_grad:
            wanted = "differentiable with respect to the images"
            _checks.fail(ValueError, self.op, "model", wanted, "logits without a graph")
        counts.gradients += len(losses)
        (grad,) = torch.autograd.grad(losses.sum(), x, allow_unused=True)
        if grad is None:
            wanted = "a function of the images"
            _checks.fail(ValueError, self.op, "model", wanted, "logits that do not depend on them")
        return grad

    def _fools(self, logits: Tensor, labels: Tensor) -> Tensor:
        correct = logits.argmax(1) == labels
        return ~correct if self.targeted is False else correct

    # ---- checks -----------------------------------------------------------------------------

    def _check_images(self, images: object) -> None:
        _checks.tensor(self.op, "images", images)
        assert isinstance(images, Tensor)
        if images.dim() < 2:
            wanted = "a batch of images"
            _checks.fail(ValueError, self.op, "images", wanted, _checks.shape_of(images))
        for name, value in self.lengths.items():
            if isinstance(value, Tensor):
                _checks.shape(self.op, name, value, (len(images),), " (one value an image)")
        if isinstance(self.model, nn.Module):
            devices = {p.device for p in self.model.parameters()}
            if devices and images.device not in devices:
                wanted = f"on the model's device {next(iter(devices))}"
                _checks.fail(ValueError, self.op, "images", wanted, images.device)
        if self.generator is not None and self.generator.device != images.device:
            wanted = f"on `images`' device {images.device}"
            _checks.fail(ValueError, self.op, "generator", wanted, self.generator.device)
        if images.numel() > 0:
            lo, hi = (float(v) for v in images.detach().aminmax())
            if not (self.bounds[0] <= lo and hi <= self.bounds[1]):
                wanted = (
                    f"within bounds={self.bounds} (for a model of normalised images use "
                    "pyvit.attacks.normalized, or give other bounds)"
                )
                _checks.fail(ValueError, self.op, "images", wanted, f"{lo:.4g} to {hi:.4g}")

    def add_lengths(self, **lengths: object) -> None:
        """Step sizes and radii: each a number, or a tensor with one value an image.

        ``begin`` and ``move`` find them in ``batch.rule``, the rows of the batch's images.
        """
        for argument, value in lengths.items():
            if isinstance(value, Tensor):
                _checks.tensor(self.op, argument, value, ndim=1)
                if not bool((torch.isfinite(value) & (value >= 0)).all()):
                    wanted = "finite and at least 0"
                    _checks.fail(ValueError, self.op, argument, wanted, value.tolist())
                self.lengths[argument] = value.detach()
            else:
                self.lengths[argument] = _checks.number(self.op, argument, value, minimum=0.0)

    def _lengths_of(self, batch: Batch) -> dict[str, float | Tensor]:
        return {
            name: value.to(batch.x.device)[batch.index] if isinstance(value, Tensor) else value
            for name, value in self.lengths.items()
        }
