"""One simulation from Python: train under a defense, attack it, look at the frames.

Run it with `.venv/bin/python examples/one_simulation.py` (a minute or less on 2 cores).
"""

from fedsim import ExperimentConfig, Simulation

if __name__ == "__main__":
    config = ExperimentConfig(
        model={"name": "lenet", "init": "uniform"},
        federation={"rounds": 60, "clients": 40, "clients_per_round": 10, "server": {"name": "adam"}},
        defense={"name": "gc", "prune": 0.7},
        attacks=[{"name": "dlg"}],
        audit={"victims": 4},
    )
    result = Simulation(config).run()
    print(f"ACC {result.accuracy:.3f}, ART {result.average_round_time:.4f} s")
    print(result.rounds[["round", "loss", "ACC", "seconds"]].dropna().to_string(index=False))
    print(result.images[["attack", "victim", "PSNR", "SSIM", "stalled"]].to_string(index=False))
