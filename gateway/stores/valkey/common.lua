-- Prepended to every script. A script is atomic: no other replica acts in between.
--
-- A task has three keys in one hash slot, and the slot has a channel:
--
--   KEYS[1]  snapshot  "sdg3 VERSION FETCHED LIFETIME SHOWN TERMINAL LF encoding"; times in microseconds;
--                      SHOWN is the moment from which on all replicas may serve it
--   KEYS[2]  failure   an encoding; expires with the negative cache
--   KEYS[3]  lease     the token of its holder
--
-- Every reply begins with the server's time, in microseconds. Written for Lua 5.1, as in Redis 6.2.
-- Numbers are doubles, exact up to 2^53, which microseconds reach in the year 2255. They are printed with
-- string.format, because tostring would round them.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- Returns the stored snapshot. An invalid one, or one from the future, counts as missing: it is overwritten.
local function stored_snapshot()
  local value = redis.pcall('GET', KEYS[1])
  if type(value) ~= 'string' then return nil end
  local pattern = '^sdg3 (%d+) (%d+) (%d+) (%d+) ([01])\n'
  local version, fetched, lifetime, shown, terminal = string.match(value, pattern)
  if not version or #version > 16 or #fetched > 16 or #lifetime > 16 or #shown > 16 then return nil end
  local snapshot = {
    value = value, version = tonumber(version), fetched = tonumber(fetched),
    lifetime = tonumber(lifetime), terminal = terminal == '1'
  }
  if snapshot.fetched > now + 3600000000 or snapshot.version > now + 3600000000 then return nil end
  return snapshot
end

-- Returns the token of the lease's holder. An invalid token does not block other replicas.
local function lease_holder()
  local token = redis.pcall('GET', KEYS[3])
  if type(token) == 'string' and string.match(token, '^%x+$') and #token == 32 then return token end
  return nil
end
