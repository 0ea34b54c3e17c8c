from ray._private.parameter import RayParams

from fedsim.engine.ports import own_agent_port


def test_two_rays_on_a_machine_do_not_fight_for_one_port() -> None:
    plain = RayParams().dashboard_agent_listen_port
    with own_agent_port():
        own = RayParams().dashboard_agent_listen_port
        assert own not in (0, plain)
        assert RayParams(dashboard_agent_listen_port=7).dashboard_agent_listen_port == 7
    assert RayParams().dashboard_agent_listen_port == plain
