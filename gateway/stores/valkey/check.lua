-- Runs each command of the scripts, and returns those that fail, for example because a permission is missing.
--
-- KEYS    1 a key for this script only
-- ARGV    1 a channel without subscribers
-- result  {command, error, command, error, …}

local failed = {}
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    table.insert(failed, (...))
    table.insert(failed, reply.err)
  end
end

try('TIME')
try('HSET', KEYS[1], 'field', '')
try('PEXPIRE', KEYS[1], 1000)
try('PTTL', KEYS[1])
try('HGET', KEYS[1], 'field')
try('HMGET', KEYS[1], 'field')
try('HEXISTS', KEYS[1], 'field')
try('HGETALL', KEYS[1])
try('HDEL', KEYS[1], 'field')
try('SET', KEYS[1], '', 'PX', 1000)
try('DEL', KEYS[1])
try('PUBLISH', ARGV[1], '')
return failed
