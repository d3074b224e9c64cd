"""What the server does in one step, in Lua. A script is atomic: no other replica acts in between.

A task has three keys, all in one hash slot, and the slot has a channel:

    KEYS[1] its snapshot    "sdg3 STAMP FETCHED LIFETIME SHOWN TERMINAL LF encoding", moments in microseconds:
                            when it was fetched, and from when on it is shown, by all
    KEYS[2] its failure     an encoding; it lives for as long as the failure is remembered
    KEYS[3] its lease       the token of who holds it

Every answer begins with the server's time. Written for Lua 5.1 as Redis 6.2 has it. Numbers are
doubles, exact up to 2^53, which microseconds reach in the year 2255; they are printed with
string.format, for tostring would round them.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """A script and the name that the server knows it by. `name` labels its metrics."""

    name: str
    text: str
    sha: str


def _script(name: str, text: str) -> Script:
    text = _COMMON + text
    # The server's own name for a script; nothing depends on its strength.
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


_COMMON = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- What is no snapshot, or one from the future, is as good as none: it will be overwritten.
local function kept()
  local value = redis.pcall('GET', KEYS[1])
  if type(value) ~= 'string' then return nil end
  local pattern = '^sdg3 (%d+) (%d+) (%d+) (%d+) ([01])\\n'
  local stamp, fetched, lifetime, shown, terminal = string.match(value, pattern)
  if not stamp or #stamp > 16 or #fetched > 16 or #lifetime > 16 or #shown > 16 then return nil end
  local snapshot = {
    value = value, stamp = tonumber(stamp), fetched = tonumber(fetched),
    lifetime = tonumber(lifetime), terminal = terminal == '1'
  }
  if snapshot.fetched > now + 3600000000 or snapshot.stamp > now + 3600000000 then return nil end
  return snapshot
end

-- What is no token holds nobody up.
local function holder()
  local token = redis.pcall('GET', KEYS[3])
  if type(token) == 'string' and string.match(token, '^%x+$') and #token == 32 then return token end
  return nil
end
"""

# ARGV: stamp held, least stamp that will do as an answer, token, lease in ms.
# -> now, kind, stamp or ms, snapshot or failure
TAKE_OFF = _script(
    "take_off",
    """
local held, least = tonumber(ARGV[1]), tonumber(ARGV[2])
local newest = kept()
local value = ''
if newest then
  if newest.stamp > held then value = newest.value end
  -- Set back, the clock may call fresh what is not; what was fetched in the future is of unknown age.
  local fresh = newest.fetched <= now and now < newest.fetched + newest.lifetime
  if fresh and newest.stamp >= least then return {now, 'fresh', 0, value, ''} end
end
local failure = redis.pcall('GET', KEYS[2])
if type(failure) == 'string' then
  return {now, 'failure', redis.call('PTTL', KEYS[2]), value, failure}
end
if holder() then
  local left = redis.call('PTTL', KEYS[3])
  -- A lease without an end is none of ours.
  if left < 0 or left > tonumber(ARGV[4]) then redis.call('PEXPIRE', KEYS[3], ARGV[4]) end
  return {now, 'taken', redis.call('PTTL', KEYS[3]), value, ''}
end
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[4])
-- Larger than every stamp before, even after a failover to a server whose clock is behind.
local stamp = math.max(now, held + 1, newest and newest.stamp + 1 or 0)
return {now, 'lease', stamp, value, ''}
""",
)

# ARGV: token, stamp, fetched, lifetime, terminal, encoding, ms to keep it; in microseconds for how long news
# may be under way, a snapshot be shown after its lifetime, and that while it covers a failure; publish
# command, channel, subject.
# -> now, 1 if it is kept and from when on it is shown; or 0 and the snapshot that is kept in its place
LAND = _script(
    "land",
    """
local stamp, terminal = tonumber(ARGV[2]), ARGV[5] == '1'
local holds = holder()
local ours = holds == ARGV[1]
local newest = kept()
-- A holder that was paused comes late: others have asked since, or are asking. What has ended stays ended.
local late = ARGV[1] ~= '' and holds and not ours
if late or newest and (newest.stamp > stamp or newest.terminal and not terminal) then
  if ours then
    redis.call('DEL', KEYS[3])
    redis.call(ARGV[11], ARGV[12], 'R' .. ARGV[13])
  end
  return {now, 0, newest and newest.value or ''}
end
local shown = now
if newest then
  -- A replica that has not heard of this one yet may show the one before.
  local stale = tonumber(redis.call('EXISTS', KEYS[2]) == 1 and ARGV[10] or ARGV[9])
  if now < newest.fetched + newest.lifetime + stale then shown = now + tonumber(ARGV[8]) end
end
shown = string.format('%.0f', shown)
local fetched = string.format('%.0f', math.min(tonumber(ARGV[3]), now))
local value = table.concat({'sdg3', ARGV[2], fetched, ARGV[4], shown, ARGV[5]}, ' ') .. '\\n' .. ARGV[6]
redis.call('SET', KEYS[1], value, 'PX', ARGV[7])
redis.call('DEL', KEYS[2])
if ours then redis.call('DEL', KEYS[3]) end
redis.call(ARGV[11], ARGV[12], 'S' .. ARGV[13] .. value)
return {now, 1, shown}
""",
)

# ARGV: token, ms to remember it, encoding, publish command, channel, subject. Late failures change nothing.
FAIL = _script(
    "fail",
    """
if holder() ~= ARGV[1] then return {now} end
redis.call('DEL', KEYS[3])
if ARGV[3] == '' then
  redis.call(ARGV[4], ARGV[5], 'R' .. ARGV[6])
else
  redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
  redis.call(ARGV[4], ARGV[5], 'F' .. ARGV[6] .. ARGV[2] .. '\\n' .. ARGV[3])
end
return {now}
""",
)

# ARGV: token, lease in ms. Whoever's lease has ended meanwhile finds out when it lands.
RENEW = _script(
    "renew",
    """
if holder() == ARGV[1] then redis.call('PEXPIRE', KEYS[3], ARGV[2]) end
return {now}
""",
)

# KEYS[1] the moment from which on the next token is free. ARGV: microseconds between two tokens, and how many
# of them may be saved up or waited for. A cell rate (GCRA): whoever takes a token may have to wait for it.
# -> now, 1 if it was taken, microseconds until it is there
TOKEN = _script(
    "token",
    """
local interval, saved, patience = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local free = redis.pcall('GET', KEYS[1])
free = type(free) == 'string' and tonumber(free) or 0
-- Set back, the clock would hold everybody up: nobody waits for longer than patience.
if free < now or free > now + 3600000000 then free = now end
local wait = math.max(free - saved - now, 0)
if wait > patience then return {now, 0, wait} end
local next_free = free + interval
local left = math.ceil((next_free - now) / 1000)
redis.call('SET', KEYS[1], string.format('%.0f', next_free), 'PX', left)
return {now, 1, wait}
""",
)

# ARGV: publish command, channel, message. KEYS[1] is nobody's.
TELL = _script(
    "tell",
    """
redis.call(ARGV[1], ARGV[2], ARGV[3])
return {now}
""",
)

# What was read makes no sense to those who should have written it.
DISCARD = _script(
    "discard",
    """
redis.call('DEL', KEYS[1], KEYS[2])
return {now}
""",
)

# ARGV: publish command, channel. KEYS[1] is nobody's. Fails wherever a flight would: read-only, full.
PROBE = _script(
    "probe",
    """
redis.call('SET', KEYS[1], '', 'PX', 1000)
redis.call(ARGV[1], ARGV[2], '')
return {now}
""",
)

SCRIPTS = (TAKE_OFF, LAND, FAIL, RENEW, TOKEN, TELL, DISCARD, PROBE)
