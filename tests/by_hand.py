"""The design's equations, written a second time: one response after another, without padding, chunks or Lightning."""

import copy
from typing import Any

import torch
from tiny import Recites, RecordingSPPO, TableVerifier, loader, make_batch, make_critic, make_policy, make_trainer
from torch import Tensor

from sppo_lightning import SPPOModule
from sppo_lightning.optim import GroupOptimizer

# prompt → its responses and their outcomes, of different lengths; None is no verdict
CASES: dict[str, list[tuple[str, float | None]]] = {
    "1 + 2 =": [("3 <eos>", 1.0)],
    "9 - 4 = ; a b c": [("5 5 5 5 5 <eos>", 0.25)],
    "2": [("7 8 9 a b c d e", 0.0)],
    "a + b - c": [("<eos>", 0.0)],
    "7 - 7 = 0 ; 1 +": [("1 = 1 <eos>", 1.0)],
    "8 8": [("d e f g", 0.5)],
    "4 ; 4 ; 4": [("k <eos>", 0.0)],
    "q r s t u": [("u t s r q p <eos>", 1.0)],
}
FAST = {
    "policy_optimizer": GroupOptimizer(lr=0.02, weight_decay=0.1, max_grad_norm=0.5),
    "critic_optimizer": GroupOptimizer(lr=0.05, weight_decay=0.0, max_grad_norm=100.0),
}


def stages(cases: Any, temperature: float = 1.0, shaping: Any = None) -> list[Any]:
    table = {
        (p, text.replace(" <eos>", "").replace("<eos>", "")): r for p, rows in cases.items() for text, r in rows
    }
    found: list[Any] = [Recites({p: [text for text, _ in rows] for p, rows in cases.items()}, temperature)]
    found.append(TableVerifier(table))
    if shaping is not None:
        found.append(
            TableVerifier({key: shaping[key[0]] for key in table}, name="shape", role="shaping", weight=0.5)
        )
    return found


def fit(module: SPPOModule, cases: Any, iterations: int = 1, temperature: float = 1.0, **settings: Any) -> Any:
    batches = [make_batch(module.policy, list(cases)) for _ in range(iterations)]  # type: ignore[arg-type]
    shaping = settings.pop("shaping", None)
    # double precision, because AdamW's first step is a sign, which rounding errors of small gradients flip
    trainer = make_trainer(*stages(cases, temperature, shaping), **{"precision": "64-true"} | settings)
    trainer.fit(module, loader(*batches))
    return trainer


def run(
    cases: Any = CASES, temperature: float = 0.7, critic: bool = True, **settings: Any
) -> tuple[RecordingSPPO, Any]:
    trainer_settings = {
        k: settings.pop(k) for k in ("iterations", "shaping", "max_steps", "precision") if k in settings
    }
    module = RecordingSPPO(make_policy(), make_critic() if critic else None, **FAST | settings)
    return module, fit(module, cases, temperature=temperature, **trainer_settings)


class ByHand:
    """The design's table, one response at a time, without padding, chunks, groups or Lightning."""

    def __init__(
        self, cases: Any = CASES, temperature: float = 0.7, shaping: Any = None, kl_coef: float = 0.0
    ) -> None:
        self.policy, self.critic = make_policy().double(), make_critic().double()
        self.reference = copy.deepcopy(self.policy)
        self.temperature, self.kl_coef = temperature, kl_coef
        self.optimizers = {
            "policy": torch.optim.AdamW(self.policy.parameters(), lr=0.02, weight_decay=0.1),
            "critic": torch.optim.AdamW(self.critic.parameters(), lr=0.05, weight_decay=0.0),
        }
        self.rows: list[dict[str, Any]] = []
        for prompt, responses in cases.items():
            for text, reward in responses:
                bonus = 0.0 if shaping is None else 0.5 * shaping[prompt]
                self.rows.append({"prompt": prompt, "text": text, "R": reward, "shaping": bonus})
        self.losses: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.begin_iteration()

    @torch.no_grad()
    def begin_iteration(self) -> None:
        for row in self.rows:
            row["V"] = torch.sigmoid(self.value(row["prompt"]))
            row["old"] = self.log_probs(self.policy, row)

    def value(self, prompt: str) -> Tensor:
        ids = torch.tensor([self.critic.tokenizer(prompt)["input_ids"]])
        return self.critic.model(input_ids=ids).logits[0, 0]

    def log_probs(self, policy: Any, row: dict[str, Any]) -> Tensor:
        prompt, response = (policy.tokenizer(row[key])["input_ids"] for key in ("prompt", "text"))
        logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0] / self.temperature
        table = torch.log_softmax(logits, dim=-1)
        return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(response)])

    def policy_losses(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        tokens = sum(len(row["old"]) for row in rows)
        policy_loss, kl_loss = torch.zeros(2, dtype=torch.float64)
        for row in rows:
            advantage = row["R"] - row["V"] + row["shaping"]
            log_probs, reference = self.log_probs(self.policy, row), self.log_probs(self.reference, row).detach()
            for t in range(len(log_probs)):
                ratio = torch.exp(log_probs[t] - row["old"][t])
                term = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                if advantage < 0:
                    term = torch.max(term, 3.0 * advantage)
                policy_loss = policy_loss - term / tokens
                delta = log_probs[t] - reference[t]
                kl_loss = kl_loss + (torch.exp(-delta) + delta - 1) / tokens
        return policy_loss, kl_loss

    def update(self, chosen: list[int]) -> None:
        rows = [self.rows[i] for i in chosen]
        policy_loss, kl_loss = self.policy_losses(rows)
        critic_loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            v = self.value(row["prompt"])
            cross_entropy = -row["R"] * torch.nn.functional.logsigmoid(v)
            cross_entropy = cross_entropy - (1 - row["R"]) * torch.nn.functional.logsigmoid(-v)
            critic_loss = critic_loss + cross_entropy / len(rows)
        self.losses.append({"policy": policy_loss.item(), "critic": critic_loss.item(), "kl": kl_loss.item()})
        (policy_loss + critic_loss + self.kl_coef * kl_loss).backward()
        modules = {"policy": (self.policy, 0.5), "critic": (self.critic, 100.0)}
        self.gradients.append(
            {f"{n}.{k}": p.grad.clone() for n, (m, _) in modules.items() for k, p in m.named_parameters()}
        )
        for name, (module, max_norm) in modules.items():
            norm = torch.sqrt(sum(p.grad.square().sum() for p in module.parameters()))
            for p in module.parameters():
                p.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def weights(module: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if not n.startswith("reference")}


class BySequence(ByHand):
    """One ratio for each response."""

    def __init__(self, normalize: str, against: str) -> None:
        self.normalize, self.against = normalize, against
        super().__init__()

    def policy_losses(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            old = row["old"] if self.against == "behaviour" else self.log_probs(self.reference, row).detach()
            log_ratio = (self.log_probs(self.policy, row) - old).sum()
            ratio = torch.exp(log_ratio / (len(old) if self.normalize == "length" else 1))
            advantage = row["R"] - row["V"]
            loss = loss - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / len(rows)
        return loss, torch.zeros((), dtype=torch.float64)
