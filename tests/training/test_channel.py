"""JSON between two processes: whole messages, and a gone partner is always noticed."""

import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_llm_components.training.channel import Channel, ChannelClosedError

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_what_is_sent_arrives(value):
    one, other = Channel.pair()
    one.send(name="load", value=value)
    assert other.receive() == {"name": "load", "value": value}
    one.close()
    other.close()


def test_a_partner_that_is_gone_is_noticed_by_each_call():
    one, other = Channel.pair()
    other.die_with_partner(True)
    other.die_with_partner(False)
    one.send(last=1)
    one.close()
    assert other.receive() == {"last": 1}
    for call in (other.receive, lambda: other.send(more=1), lambda: other.die_with_partner(True)):
        with pytest.raises(ChannelClosedError):
            call()
    other.close()


BUSY = """
import sys, time
from nvflare_llm_components.training.channel import Channel
channel = Channel(int(sys.argv[1]))
channel.die_with_partner(True)
channel.die_with_partner(False)
channel.send(asleep=True)
assert channel.receive() == {"go": "on"}
channel.die_with_partner(True)
print("busy", flush=True)
time.sleep(600)
"""


def test_a_busy_process_dies_with_its_partner():
    ours, theirs = Channel.pair()
    descriptor = theirs.connection.fileno()
    command = [sys.executable, "-c", BUSY, str(descriptor)]
    with subprocess.Popen(command, pass_fds=[descriptor], stdout=subprocess.PIPE) as busy:
        theirs.close()
        assert ours.receive() == {"asleep": True}
        ours.send(go="on")
        assert busy.stdout
        assert busy.stdout.readline() == b"busy\n"
        ours.close()
        assert busy.wait(30) == -signal.SIGIO
