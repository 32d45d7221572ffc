package monitor

import (
	"encoding/json"
	"testing"

	"redoubt.dev/redoubt/isolate"
	"redoubt.dev/redoubt/isolate/policy"
	"redoubt.dev/redoubt/lab"
)

// Debian's own modules work in a view of their own.
func TestFence(t *testing.T) {
	lab.NeedsKVM(t)
	for _, kernel := range []string{"6.1-cloud"} {
		t.Run(kernel, func(t *testing.T) {
			tpm := startTPM(t)
			g := boot{
				kernel: kernel, what: "modules", modules: []string{"dummy"},
				change: func(cfg *Config) {
					cfg.TPM = tpm
					cfg.Modules = &isolate.Modules{Default: isolate.Isolate, Mode: policy.Monitor}
					cfg.OnModule = func(e isolate.Event) { t.Log(e) }
				},
			}.build(t)
			out := g.run(t)
			r, _ := g.Fenced()
			b, err := json.MarshalIndent(r.Modules, "", " ")
			t.Logf("%v\n%s\n%s %v", out, g.console, b, err)
		})
	}
}
