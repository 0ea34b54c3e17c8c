from ray._private.node import Node
from ray._private.parameter import RayParams

from fedsim.engine.lean_node import lean_node


def test_two_rays_on_a_machine_do_not_fight_for_one_port() -> None:
    plain = RayParams().dashboard_agent_listen_port
    with lean_node():
        own = RayParams().dashboard_agent_listen_port
        assert own not in (0, plain)
        assert RayParams(dashboard_agent_listen_port=7).dashboard_agent_listen_port == 7
    assert RayParams().dashboard_agent_listen_port == plain


def test_a_private_node_starts_no_autoscaler_and_no_dashboard() -> None:
    serve = Node.start_api_server
    with lean_node():
        assert RayParams().no_monitor
        assert Node.start_api_server(None, include_dashboard=False, raise_on_failure=False) is None
    assert not RayParams().no_monitor and Node.start_api_server is serve
