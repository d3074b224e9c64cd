-- Returns a result that makes an upstream query unnecessary, or grants the lease for one.
--
-- KEYS    1 the task
-- ARGV    1 latest version known to the caller, 2 smallest version that is a result, 3 oldest revision that is
--         a result, 4 token ('': only read the snapshot), 5 channel, 6 name of the task, 7 smallest version of a new
--         lease; in microseconds: 8 duration of the lease, 9 how long the caller caches failures
-- result  {kind, number, version, age, lifetime, terminal, value, failure}; times in microseconds
--         kind     "fresh", "failure", "held", "lease" or "none"
--         number   lease: version of the next snapshot; failure, held: time until it ends
--         version, age, lifetime, terminal, value  the stored snapshot; value is '' if the caller knows it
--         failure  the encoding of the cached failure; '' unless the kind is "failure"

local now = time_now()
local known, least, revision, lease = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[8])
local task = read_task(now)

local function reply(kind, count)
  local value, failure = '', ''
  if task.version > known or task.terminal and task.version ~= known then value = redis.call('HGET', KEYS[1], 'value') or '' end
  if kind == 'failure' then failure = redis.call('HGET', KEYS[1], 'failure') or '' end
  return {kind, count, task.version, task.age, task.lifetime, task.terminal and 1 or 0, value, failure}
end

local fresh = task.version > 0 and task.age >= 0 and task.age < task.lifetime
local new_enough = task.version >= least and (task.version >= revision or task.revision == revision)
if fresh and (new_enough or task.terminal) then return reply('fresh', 0) end
if ARGV[4] == '' then return reply('none', 0) end
if pending(task.failed_until, now, tonumber(ARGV[9])) then return reply('failure', task.failed_until - now) end
if task.holder and pending(task.held_until, now, lease) then return reply('held', task.held_until - now) end
redis.call('HSET', KEYS[1], 'holder', ARGV[4], 'held_until', text(now + lease))
keep(math.ceil(lease / 1000))
-- The server may have evicted the key: replicas that have a snapshot of the task write it again.
if task.version == 0 and known == 0 then redis.call('PUBLISH', ARGV[5], 'Q' .. ARGV[6]) end
return reply('lease', math.max(tonumber(ARGV[7]), task.version + 1, task.revision + 1))
