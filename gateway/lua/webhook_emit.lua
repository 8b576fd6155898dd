-- Queues an event that nothing takes back.
--
-- KEYS[1]  string by which repetitions are known
-- ARGV[1]  hook, see webhook_facts.lua
-- ARGV[2]  event
-- ARGV[3]  for how long the same event is a repetition, in milliseconds; 0: never
--
-- Returns 1 when it is queued, 0 when it is a repetition.

if ARGV[3] ~= '0' and not redis.call('SET', KEYS[1], 1, 'NX', 'PX', ARGV[3]) then
  return 0
end
hook_queue(cjson.decode(ARGV[1]), ARGV[2])
return 1
