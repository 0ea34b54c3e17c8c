"""A defense of your own: send only the sign of the update, scaled to keep its mean magnitude.

Run it with `.venv/bin/python examples/own_defense.py`. On the command line the same is

    cd examples && fedsim run defense.name=custom defense.factory=own_defense:SignUpdate
"""

from torch import Tensor

from fedsim import ClientContext, Defense, ExperimentConfig, Simulation


class SignUpdate(Defense):
    """Replace every entry by its sign times the update's mean magnitude (Seide et al., Interspeech 2014)."""

    def protect(self, updates: Tensor, context: ClientContext) -> Tensor:
        """Quantise K updates at once: [K, d] → [K, d]."""
        return updates.sign() * updates.abs().mean(dim=1, keepdim=True)

    def upload_bytes(self, protected: Tensor) -> Tensor:
        """One bit an entry, and the scale."""
        clients, dimension = protected.shape
        return protected.new_full((clients,), dimension / 8 + 4)


if __name__ == "__main__":
    config = ExperimentConfig(
        name="sign-update",
        model={"name": "lenet", "init": "uniform"},
        federation={"rounds": 60, "clients": 40, "server": {"name": "adam"}},
        defense={"name": "custom", "factory": "own_defense:SignUpdate"},
        attacks=[{"name": "dlg"}],
        audit={"victims": 4},
    )
    result = Simulation(config).run()
    print(f"ACC {result.accuracy:.3f}, {result.summary['upload_bytes']:.0f} bytes a client a round")
    print(result.images[["attack", "victim", "PSNR", "SSIM", "stalled"]].to_string(index=False))
