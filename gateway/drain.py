"""What a stopping server owes to connections that have nothing under way yet.

Who has connected before the listener closed is answered, whether the server had accepted him by
then or not, and whether he had asked yet or not. So nobody is closed on while something that he
has sent waits to be read: the kernel would reset the connection, and he could not know why.

Source: RFC 9112 section 9.6 (an answer with `Connection: close` is the last one), RFC 9110
section 15.5.9 (408 asks to try again on another connection), decision 87.
"""

from __future__ import annotations

import select
from typing import Final

# How long a newcomer may still ask, and half a call still come, once the server has begun to stop.
FIRST_WORDS_S: Final = 3.0
# What has come is read in the loop's next turn; after this time it is looked at again.
READ_SOON_S: Final = 0.01
# The last words to a newcomer that has not asked in time.
NOTHING_CAME: Final = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


def something_waits(fd: int) -> bool:
    """Whether there is something to read, or someone to accept, at this descriptor."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))
