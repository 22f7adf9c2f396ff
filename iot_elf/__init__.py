# SPDX-License-Identifier: Apache-2.0
"""What elf.py is built on. No module here knows a command or imports elf.py; each uses only those above it.

defaults      numbers and names that two modules need: AWS IoT's limits, and how long ELF waits
text          words and numbers for people; the loggers; what may be printed, and what is secret
errors        what a failure is called, what is wrong, and what to do
events        what a command waits for: its things, Ctrl-C, a deadline
storage       a directory that is claimed, locked, kept private and written without loss; its journal
places        where a fleet is: its region and account, and what an ARN says of them
state         the fleet in misc/: its things, and requests without an answer
sign_in       boto3's session: credentials, STS, MFA
aws           boto3's client for AWS IoT: quotas, repetitions, many calls at a time
ownership     which things, certificates and policies of AWS are this ELF's, and whether they are really gone
adoption      what AWS has of an ELF and misc/ lacks
messages      payloads, files of messages, topics, client IDs
sequences     which numbers of a sender have arrived, and which are missing
metrics       the record of a run: totals, per thing, per second; latencies
network       the broker's address, and proxies on the way there
mqtt          the device SDK's clients, all on one thread
outbox        what a thing has to send: queued, in flight, to send again; AWS's limits of a connection
refusals      the broker's refusals of a thing, in a row: whether to ask AWS, when to give up
device        one thing on MQTT: gets and keeps its connection
outages       times without a connection, which a run makes itself
runners       the things of a running send or subscribe: waits, counts, and when lines are due
console       log lines, JSON lines, the live line
results       what the record of a run looks like: the report, the summary, the live line
arguments     the parser's mechanism: its class, and types of arguments

On demand, imported only where they are needed:

screen        the terminal's second screen: only with --view
view          the table of a run's things: only with --view
sandbox       what a template may do
templates     messages from templates: only for `send --template`
replay        messages of recordings, each of one thing: only for `send --replay`
diagnosis     why something is refused, or can't connect: only then
charts        what a run looks like over time, as SVG: only with --report
report        the page of a run: only with --report
local_aws     the embedded AWS IoT: only with --local
"""
