"""A child process that answers what it is told to, whole or in part, as a hijacked one might."""

import os
import sys
import time

from flipguard_onnx.runtime.messages import Channel


def main():
    requests, answers = (int(number) for number in sys.argv[-2:])
    channel = Channel(requests, answers)
    while True:
        arguments = channel.receive().fields["arguments"]
        content = memoryview(bytes.fromhex(arguments["answer"]))
        os.set_blocking(answers, True)
        while content:
            content = content[os.write(answers, content) :]
        if arguments["then"] == "exit":
            os._exit(3)
        if arguments["then"] == "hang":
            time.sleep(600)
