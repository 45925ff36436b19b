"""The payload of a lean stage 2, which runs no Python: judged in master, carried out there.

Master sees the container by a descriptor of its root, and is what the payload is: the same user,
with no right that the other lacks (`is_fit`, and fits_lean() in starter/policy.c). What differs for
each process that looks, as below /proc, is left to the image's shell.
"""

from __future__ import annotations

from apptainer_py.engines.apptainer.payload import Payload
from apptainer_py.engines.apptainer.views import Outside
from apptainer_py.model import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.payload import Message
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.plan import ContainerPlan
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.bearer import Bearer
    from apptainer_py.runtime.contexts import Facts


def is_fit(prepared: Prepared, action: ActionRequest, facts: Facts, plan: ContainerPlan) -> bool:
    """Return whether master can say what the payload is, and no program is started beside it."""
    if prepared.fakeroot or prepared.service or prepared.fuses or prepared.joined or action.boot:
        return False
    if prepared.filter or prepared.label:
        return False  # what an execve could not do would have to be told from behind them
    other = plan.flags & protocol.PLANFLAG_GROUPS or plan.groups
    if other or (plan.uid, plan.gid) != (facts.uid, facts.gid):
        return False
    # Root of the host sees with root's rights, which its payload has by default.
    full = facts.permitted if facts.flow == protocol.FLOW_ROOT else 0
    return plan.caps[1] == full


def view_of(root: int, bearer: Bearer, message: Message) -> Outside:
    """Return master's view of the container whose root is open."""
    return Outside(root, bearer, int(message[b"umask"][0]))


def judge(view: Outside, message: Message) -> Payload:
    """Find out what the payload will be, if its directory is the one that is wanted."""
    wanted = Payload(message, view)
    first = message[b"cwd"][0]
    view.ask_to_enter(first)
    wanted.judge(first)
    return wanted


def start(view: Outside, wanted: Payload, message: Message) -> None:
    """Have stage 2 become it.

    Raises:
        LaunchError: the directory or the program cannot be used.
    """
    wanted.enter()
    if message[b"console"]:
        view.take_console()
    wanted.start()
