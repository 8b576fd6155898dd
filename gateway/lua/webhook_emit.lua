-- Queues an event that nothing takes back.
--
-- ARGV[1]  hook, see webhook_facts.lua
-- ARGV[2]  event

hook_queue(cjson.decode(ARGV[1]), ARGV[2])
