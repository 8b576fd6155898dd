-- Publishes a client event and records it for webhooks.
--
-- ARGV[1]  pub/sub channel
-- ARGV[2]  publication
-- ARGV[3]  hook, see webhook_facts.lua
-- ARGV[4]  event
--
-- Returns how many nodes were subscribed.

hook_queue(cjson.decode(ARGV[3]), ARGV[4])
return redis.call('PUBLISH', ARGV[1], ARGV[2])
