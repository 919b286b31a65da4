def draw(*a):
    raise RuntimeError


replay = replay_backward = draw
