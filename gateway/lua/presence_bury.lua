-- Forgets a dead node when none of its entries is left.
--
-- KEYS[1]  zset   node -> end of its lease, in milliseconds of Redis' clock
-- KEYS[2]  set    the node's entries
-- ARGV[1]  the node
--
-- Returns 1 when it is forgotten, 0 when it is alive or still has entries.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if (lease and tonumber(lease) > now) or redis.call('SCARD', KEYS[2]) > 0 then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
