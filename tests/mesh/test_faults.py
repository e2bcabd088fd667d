"""Faults come all at once, numbered when there are several."""

import pytest

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults, suggestion


def test_one_fault_is_its_own_message() -> None:
    with pytest.raises(DeclarationError) as error:
        raise_faults(iter([Fault("mesh axis 'data'", "has size 0", "give it a positive size")]))
    assert str(error.value) == "mesh axis 'data': has size 0; give it a positive size"


def test_several_faults_are_numbered() -> None:
    with pytest.raises(DeclarationError) as error:
        raise_faults([Fault("a", "is odd", "even it"), Fault("b", "is red", "paint it")])
    assert str(error.value) == "2 faults in the declaration:\n  1. a: is odd; even it\n  2. b: is red; paint it"


def test_no_fault_raises_nothing() -> None:
    raise_faults([])


def test_a_suggestion_only_where_a_name_is_near() -> None:
    assert suggestion("tensr", ("data", "tensor")) == "did you mean 'tensor'? "
    assert suggestion("xyz", ("data", "tensor")) == ""
