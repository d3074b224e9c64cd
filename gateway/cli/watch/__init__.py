"""The parts of `sd-gateway watch`; `session.py` connects them.

client.py   reads the event stream, with the parsed events of events.py
polls.py    long polls, for networks that hold streams back
health.py   asks the gateway for what is degraded
images.py   saves the images of tasks that have succeeded
tasks.py    what is known of each task
display.py  the live display in a terminal;  lines.py  lines in a pipe
words.py    the texts that both show
"""
