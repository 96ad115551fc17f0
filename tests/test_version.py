import pytest

from slicevit.version import SUPPORTED, check_installed, check_version


def test_what_is_installed_is_supported():
    check_installed()


@pytest.mark.parametrize("found", ["2.11.0", "2.14.1+cu130", "2.15.3"])
def test_every_release_in_the_range_is_taken(found):
    check_version("torch", found)


def test_an_older_torch_is_refused_with_the_command_that_helps():
    with pytest.raises(ImportError, match=r'pip install "torch>=2\.11,<2\.16"'):
        check_version("torch", "2.10.1")


def test_a_newer_timm_is_warned_of():
    with pytest.warns(UserWarning, match="has not been tested"):
        check_version("timm", "1.1.0")


def test_the_ranges_are_those_of_the_package_metadata():
    from importlib.metadata import requires

    declared = {line.split(";")[0].replace(" ", "") for line in requires("slicevit") or ()}
    for package, (oldest, above) in SUPPORTED.items():
        assert {f"{package}<{above},>={oldest}", f"{package}>={oldest},<{above}"} & declared
