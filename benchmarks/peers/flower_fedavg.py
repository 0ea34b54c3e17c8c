"""Flower's simulation engine on its Ray backend: `pip install "flwr[simulation]" torch`, then run this file."""

import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workload import CLIENTS, LeNet, Watch, arguments, clients, train

options, watch = arguments(), Watch()
client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def local_training(message: Message, context: Any) -> Message:
    """Train one client."""
    torch.set_num_threads(1)
    model = LeNet()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    used = train(model, *clients()[context.node_config["partition-id"]], options.steps)
    reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": used})}
    return Message(RecordDict(reply), reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that notes when rounds end."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Add the replies, of which none may be missing: Flower goes on without clients that failed."""
        replies = list(replies)
        failed = options.clients - sum(reply.has_content() for reply in replies)
        if failed:
            raise RuntimeError(f"round {server_round}: {failed} of {options.clients} clients failed")
        result = super().aggregate_train(server_round, replies)
        watch.round_done()
        return result


@server_app.main()
def serve(grid: Any, context: Any) -> None:
    """Run the rounds."""
    strategy = TimedFedAvg(
        fraction_train=options.clients / CLIENTS,
        fraction_evaluate=0.0,
        min_train_nodes=options.clients,
        min_available_nodes=CLIENTS,
    )
    strategy.start(grid, ArrayRecord(LeNet().state_dict()), num_rounds=options.rounds)


if __name__ == "__main__":
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": options.workers},
        },
    )
    watch.report()
