import pytest

from sb3_mbpo.schedules import check_positive, check_rollout_length, imagined_capacity, real_ratio_at, rollout_length_at


@pytest.mark.parametrize(
    ("step", "length"), [(0, 1), (20_000, 1), (29_285, 1), (29_286, 2), (85_000, 8), (149_999, 14), (150_000, 15), (10**6, 15)]
)
def test_rollout_length_of_the_papers_hopper(step, length):
    # by hand: k reaches 2 when 14 * (step - 20000) / 130000 >= 1, that is at step 29285.7
    assert rollout_length_at(step, (20_000, 150_000, 1, 15)) == length


def test_rollout_length_may_fall_jump_or_stay():
    assert rollout_length_at(50, (0, 100, 5, 1)) == 3
    assert [rollout_length_at(step, (10, 10, 1, 4)) for step in (9, 10, 11)] == [1, 4, 4]
    assert rollout_length_at(12345, 7) == 7


@pytest.mark.parametrize(
    "rollout_length", [0, -1, (20, 10, 1, 5), (0, 10, 0, 5), (0, 10, 1), (0.0, 10.0, 1, 5), (0, 10, 1, 2.5), "1", 1.5, None]
)
def test_a_bad_rollout_length_is_refused(rollout_length):
    with pytest.raises(ValueError, match="rollout_length"):
        check_rollout_length(rollout_length)


def test_a_yaml_list_is_a_schedule():
    assert check_rollout_length([0, 10, 1, 5]) == (0, 10, 1, 5)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((100, 5, 20, 50), 500),
        ((100_000, 1, 1000, 250), 400_000),
        ((100_000, 15, 1000, 250), 6_000_000),
        ((100_000, 25, 5000, 1000), 12_500_000),
    ],
)
def test_capacity_of_the_papers_hopper_and_humanoid(arguments, rows):
    assert imagined_capacity(*arguments) == rows


def test_real_ratio_may_be_a_schedule():
    assert real_ratio_at(0.3, 0.05) == 0.05
    assert real_ratio_at(0.3, lambda progress: 1 - progress) == pytest.approx(0.7)
    for bad in (-0.01, 1.01, float("nan"), lambda progress: 2.0, None, "0.5", [0.1], lambda progress: None):
        with pytest.raises(ValueError, match=r"`real_ratio` must be a number between 0 .*, but got"):
            real_ratio_at(1.0, bad)


@pytest.mark.parametrize("value", [0, -5, 1.5, "3", True])
def test_only_positive_ints_pass(value):
    with pytest.raises(ValueError, match="`policy_delay` must be an int of at least 1, but got"):
        check_positive("policy_delay", value)
