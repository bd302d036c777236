"""FedLabel: federated learning with few labels, pseudo labels from the local or the global model, whichever is surer.

Paper: Cho, Joshi, Dimitriadis, "Local or Global: Selective Knowledge Assimilation for Federated Learning with Limited
Labels", ICCV 2023, arXiv:2307.08809. No official code is public: a reconstruction. The paper's: the choice between the
two models by confidence, and the consistency between them where they agree. Filled in, as in FixMatch where it says
how: the threshold on confidence, steps on labelled and unlabelled samples together, the optimiser's numbers, the
weights lambda_0 = lambda_u = 1, and that pseudo labels are averaged over the sure samples.

Index legend: b unlabelled and a labelled samples of a step, k classes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.engines.federated import FederatedModule, Message, Samples, Views, masked_mean, pixels
from zoo.vision.federated.data_semi_supervised import labelled_part, two_pools


def assimilate(
    local: Tensor, world: Tensor, student: Tensor, mask: Tensor, threshold: float, expert: str = "select"
) -> dict[str, Tensor]:
    """What each unlabelled sample is to learn from the two models, and how far the student is from it.

    The expert is the surer model (the local one if both are as sure); it gives the pseudo label of samples of which it
    is sure to ``threshold`` at least. Where the other model names the same class, the student is also drawn to the
    other's whole distribution p', with the weight c' / c of the two confidences: c' / c KL(p' || student).

    Args:
        local, world: probabilities by the client's model as it is now, and by the one that it was sent.
        student: scores of the client's model on the strong view, with gradient. mask: samples that are no padding.
        expert: "select", or always "local" or "global".
    Shapes:
        local, world, student: (b, k); mask: (b,) bool
        returns: "pseudo" and "consistency" (b,), 0 where a sample has none; "sure", "agree", "local" (b,) bool
    """
    (c_l, k_l), (c_g, k_g) = local.max(1), world.max(1)
    ours = {"select": c_l >= c_g, "local": torch.ones_like(mask), "global": torch.zeros_like(mask)}[expert]
    label, sureness = torch.where(ours, k_l, k_g), torch.where(ours, c_l, c_g)
    other, less = torch.where(ours[:, None], world, local), torch.where(ours, c_g, c_l)
    sure = mask & (sureness >= threshold)
    agree = sure & (k_l == k_g)
    log = student.log_softmax(1)
    divergence = (torch.special.xlogy(other, other) - other * log).sum(1)
    return {
        "pseudo": F.nll_loss(log, label, reduction="none") * sure,
        "consistency": less / sureness * divergence * agree,
        "sure": sure,
        "agree": agree,
        "local": ours & sure,
    }


class FedLabel(FederatedModule):
    """Every client has few labels; each unlabelled sample is labelled by the local or the global model, the surer one.

        L = CE(l(x), y) + weight (CE(l(strong u), label*) + consistency c' / c* KL(p' || l(strong u)))

    l is the client's model as it is now, g the one that it was sent, frozen and in eval mode. On the weak view of u
    both give probabilities; label* and c* are the surer one's, p' and c' the other's. The second term counts where
    c* >= ``threshold``, the third where both name the same class as well. Nothing but the model is sent.

    ``weight=0`` leaves federated averaging on the labelled samples; ``expert="local"`` or ``"global"`` with
    ``consistency=0`` is FedAvg with FixMatch by one of the two models. With batch norm the passes over weak and strong
    views both move the running statistics.

    Args:
        expert: which model labels: "select" (the surer one), "local" or "global".
        threshold: least confidence of a pseudo label.
        weight: of both terms on unlabelled samples. consistency: lambda_0, of the second of them.
        average: divide by the samples that count ("masked") or by all unlabelled ones, as FixMatch does ("batch").
        labelled_batch: labelled samples of a step, beside ``local_batch`` unlabelled ones, over which local epochs are
            counted.
        strong: views of the strong kind; ``augment`` are those of the weak one.

    Example:
        >>> import torch
        >>> from zoo.vision import FedLabel
        >>> model = FedLabel.from_variant("tiny", num_clients=8, in_channels=1, image_size=8)
        >>> model.predict(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    padded: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "norm": "none",
            "labelled_batch": 16,
            "local_epochs": 1,
            "augment": ["crop:1"],
            "strong": ["crop:1", "noise:0.15", "erase:3"],
        }
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 100,
        expert: str = "select",
        threshold: float = 0.95,
        weight: float = 1.0,
        consistency: float = 1.0,
        average: str = "masked",
        labelled_batch: int = 32,
        algorithm: str = "fedavg",
        mu: float = 0.1,
        server_lr: float = 1.0,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        lr_decay: float = 1.0,
        local_epochs: int = 5,
        local_steps: int | None = None,
        local_batch: int = 64,
        drop_last: bool = False,
        norm: str = "group",
        batch_norm: str = "aggregate",
        personal: list[str] = [],  # noqa: B006 (read only; the command knows no tuple)
        clip: float = 0.0,
        augment: list[str] = ["flip", "crop:4"],  # noqa: B006
        strong: list[str] = ["randaugment:2", "erase:16", "flip", "crop:4"],  # noqa: B006
        mean: list[float] = [],  # noqa: B006
        std: list[float] = [],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        if expert not in ("select", "local", "global"):
            raise ValueError(f"expert is {expert!r}; 'select', 'local' or 'global'.")
        if average not in ("masked", "batch"):
            raise ValueError(f"average is {average!r}; 'masked' or 'batch'.")
        if not 0 <= threshold <= 1 or weight < 0 or consistency < 0 or labelled_batch < 1:
            raise ValueError(
                f"threshold={threshold}, weight={weight}, consistency={consistency}, labelled_batch={labelled_batch}: "
                "the threshold in [0, 1], weights not negative, at least one labelled sample."
            )
        self._setup()
        self.strong = Views(strong)

    # ---- a client's loss ----------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The class's L on one step.

        Shapes:
            batch: "image", "strong" (b, c, h, w) in [0, 1] and "mask" (b,), unlabelled; "global" (b, k) probabilities;
                "known" (a, c, h, w), "label" (a,), "labelled" (a,), False where a client without labels fills up
        """
        hp, mask = self._hp, batch["mask"]
        x = self.normalise(batch["known"])
        if hp["weight"]:
            with torch.no_grad():
                local = self.logits(model, self.normalise(batch["image"])).softmax(1)
            x = torch.cat([x, self.normalise(batch["strong"])])
        logits = self.logits(model, x)
        known = logits[: len(batch["known"])]
        each = F.cross_entropy(known, batch["label"].clamp(min=0), reduction="none")
        found = {"supervised": masked_mean(each, batch["labelled"])}
        if not hp["weight"]:
            return {"loss": found["supervised"], **found}
        terms = assimilate(local, batch["global"], logits[len(known) :], mask, hp["threshold"], hp["expert"])
        whole = hp["average"] == "batch"
        for name, count in (("pseudo", "sure"), ("consistency", "agree")):
            found[name] = masked_mean(terms[name], mask if whole else terms[count])
        found["sure_share"] = masked_mean(terms["sure"].float(), mask)
        found["local_share"] = masked_mean(terms["local"].float(), terms["sure"])
        loss = found["supervised"] + hp["weight"] * (found["pseudo"] + hp["consistency"] * found["consistency"])
        return {"loss": loss, **found}

    # ---- a client's round ---------------------------------------------------------------------------------------

    def local(self, batch: dict[str, Any], down: Message, rows: Any) -> tuple[Message, Message, Message]:
        hp = self._hp
        if "known" not in batch:
            raise ValueError("The batch does not say how many of each client's samples are labelled ('known').")
        steps = hp["local_steps"] or hp["local_epochs"] * -(-max(batch["size"]) // hp["local_batch"])
        return super().local(two_pools(batch, hp["labelled_batch"], steps), down, rows)

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        """Unlabelled samples in two views, with the global model's word on the weak one, and labelled samples."""
        found = super().local_batch(samples, step, count)
        generators = samples.generators[:count]
        part = labelled_part(samples, step, count)
        weak, mask, rows = found["image"], found["mask"], found["row"]
        batch = {"known": self.views(pixels(part["image"]), generators), "mask": mask}
        batch |= {key: part[key] for key in ("label", "labelled")}
        if not self._hp["weight"]:
            return batch
        strong = self.strong(pixels(samples.batch["image"][rows]), generators)
        self.model.eval()
        with torch.no_grad():
            world = self.logits(self.model, self.normalise(weak.flatten(0, 1))).softmax(1)
        self.model.train()
        return batch | {"image": weak, "strong": strong, "global": world.view(*mask.shape, -1)}
