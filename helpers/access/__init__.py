"""What may be edited, an adapter or the whole model, and what that means for each step of a method."""

from helpers.access.adapter import AdapterAccess
from helpers.access.full import FullAccess
from helpers.access.interface import Access
from helpers.core.errors import LabError, nearest
from helpers.core.profile import Profile

__all__ = ["Access", "AdapterAccess", "FullAccess", "access_to"]

ACCESSES: dict[str, type[Access]] = {kind.name: kind for kind in (AdapterAccess, FullAccess)}


def access_to(profile: Profile, name: str) -> Access:
    """The access of this name to the profile's model, with the profile's numbers for it.

    Args:
        profile: of the model.
        name: "adapter" or "full", as `ACCESS` says it.

    Raises:
        LabError: another name.
    """
    if name not in ACCESSES:
        raise LabError(f"access = '{name}' is unknown{nearest(name, ACCESSES)}")
    return ACCESSES[name](profile)
