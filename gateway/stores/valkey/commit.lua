-- Stores a snapshot, announces it, and ends the lease.
--
-- KEYS    1 the task
-- ARGV    1 token, '' without a lease, or 'restore' for an earlier snapshot; 2 version, 3 latest version known
--         when it was built, 4 revision, 5 age and 6 lifetime in microseconds, 7 terminal, 8 value,
--         9 milliseconds to keep it, 10 channel, 11 name of the task, 12 duration of a lease in microseconds
-- result  {kind, version, age, lifetime, terminal, value}: the stored snapshot as in acquire.lua
--         kind  "stored"; or "follow": another snapshot was stored since the caller built this one, build it
--               again; or "refused": the stored snapshot is kept, because it is newer or terminal, or because
--               another replica has the lease

local now = time_now()
local token, version, terminal = ARGV[1], tonumber(ARGV[2]), ARGV[7] == '1'
local task = read_task(now)
local held = task.holder and pending(task.held_until, now, tonumber(ARGV[12]))
local ours = token ~= '' and task.holder == token

local function reply(kind)
  local value = redis.call('HGET', KEYS[1], 'value') or ''
  return {kind, task.version, task.age, task.lifetime, task.terminal and 1 or 0, value}
end

-- Fencing: a holder that was paused may commit when its lease has expired and another replica has the lease. A
-- terminal snapshot is never replaced by one that is not terminal.
local older = version < task.version
-- A snapshot that was fetched without the server: the queries of several replicas may have overlapped. Only a
-- query that was sent after the stored response had arrived certainly has a newer one.
if token == 'restore' then older = version ~= task.version and version <= task.revision end
if task.terminal ~= terminal then older = task.terminal end
if token ~= '' and token ~= 'restore' and held and not ours or older then
  if ours then
    redis.call('HDEL', KEYS[1], 'holder', 'held_until')
    redis.call('PUBLISH', ARGV[10], 'E' .. ARGV[11])
  end
  return reply('refused')
end
if task.version > tonumber(ARGV[3]) and not terminal then return reply('follow') end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'revision', ARGV[4], 'fetched', text(now - tonumber(ARGV[5])),
  'lifetime', ARGV[6], 'terminal', ARGV[7], 'value', ARGV[8])
redis.call('HDEL', KEYS[1], 'failure', 'failed_until')
if ours then redis.call('HDEL', KEYS[1], 'holder', 'held_until') end
keep(tonumber(ARGV[9]))
local metadata = table.concat({ARGV[2], ARGV[4], ARGV[5], ARGV[6], ARGV[7]}, ' ')
redis.call('PUBLISH', ARGV[10], 'S' .. ARGV[11] .. '\n' .. metadata)
return {'stored', version, 0, 0, 0, ''}
