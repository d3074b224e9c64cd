-- Prepended to every script. A script is atomic: no other replica acts in between.
--
-- Each task has one key, a hash. Every field may be missing. Times are in microseconds of the server's clock.
--
--   version revision fetched lifetime terminal value   the latest snapshot; `value` is its encoding (codec.py)
--   failed_until failure                      the cached failure and its encoding
--   holder held_until                         the lease: the token of its holder
--
-- The server's clock may be set back while the gateway runs. Stored moments may then be in the future. The end of
-- a lease or of a cached failure counts only if it is no further in the future than the gateway sets it. A snapshot
-- with a negative age counts as stale.
--
-- Written for Lua 5.1, as in Redis 6.2. Numbers are doubles, exact up to 2^53, which microseconds reach in
-- the year 2255. They are printed with string.format, because tostring would round them.

local function time_now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function number(text)
  return type(text) == 'string' and #text <= 16 and string.match(text, '^%d+$') and tonumber(text) or nil
end

local function text(value)
  return string.format('%.0f', value)
end

-- Handles an error of a read: deletes the key if it is not a hash, and raises any other error.
local function discard(reason)
  if not string.find(reason, 'WRONGTYPE', 1, true) then error(reason) end
  redis.call('DEL', KEYS[1])
  return {}
end

-- Returns the task's fields, except `value` and `failure`, which may be large. An invalid field counts as missing.
local function read_task(now)
  local names = {
    'version', 'fetched', 'lifetime', 'terminal', 'failed_until', 'holder', 'held_until', 'revision'
  }
  local fields = redis.pcall('HMGET', KEYS[1], unpack(names))
  if fields.err then fields = discard(fields.err) end
  local version, fetched, lifetime = number(fields[1]), number(fields[2]), number(fields[3])
  local task = {version = 0, revision = 0, age = -1, lifetime = 0, terminal = false}
  local complete = version and fetched and lifetime and redis.call('HEXISTS', KEYS[1], 'value') == 1
  if complete then
    task = {version = version, age = now - fetched, lifetime = lifetime, terminal = fields[4] == '1'}
    task.revision = number(fields[8]) or version
  end
  task.failed_until, task.holder, task.held_until = number(fields[5]) or 0, fields[6], number(fields[7]) or 0
  return task
end

-- Returns whether `moment` is in the future, by at most `most` microseconds.
local function pending(moment, now, most)
  return moment > now and moment <= now + most
end

-- Keeps the key for at least so many milliseconds.
local function keep(milliseconds)
  if redis.call('PTTL', KEYS[1]) < milliseconds then redis.call('PEXPIRE', KEYS[1], milliseconds) end
end
