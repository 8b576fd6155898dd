-- Queues an end that nothing took back in its time.
--
-- KEYS[1]  zset   fact -> when it counts
-- ARGV[1]  hook, see webhook_facts.lua; empty when nobody wants to hear of it
-- ARGV[2]  fact
-- ARGV[3]  event
--
-- Returns 1 when the fact counted, 0 when it was taken back or counted by another node.

local at = redis.call('ZSCORE', KEYS[1], ARGV[2])
if not at or tonumber(at) > hook_now() then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[2])
if ARGV[1] ~= '' then
  hook_queue(cjson.decode(ARGV[1]), ARGV[3])
end
return 1
