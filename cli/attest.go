package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/attest"
	"redoubt.dev/redoubt/attest/ima"
	"redoubt.dev/redoubt/services/vtpm"
)

func (a *app) attestCommand() *cobra.Command {
	var o attestOptions
	c := &cobra.Command{
		Use:   "attest NAME",
		Short: "Check what a running guest has booted",
		Long: `Asks a running guest's vTPM for a quote and checks, in this order: EK certificate chain,
credential activation, attestation key, signature, nonce, PCR digest, event log replay, IMA list,
policy. It prints which step failed and which PCR, event or entry differs; the exit status is 1 then.

Without --policy what was booted is shown but not judged.

The IMA list, what the guest's kernel has measured since it booted, is read from the guest's memory after the
quote: what PCR 10 vouches for counts. With --ima-allow each of its files must be allowed. With --ima-known the next
attestation of the same boot reads only what is new.`,
		Example: `  redoubt attest web-1
  redoubt attest web-1 --save-policy good.yaml     # what boots today is good
  redoubt attest web-1 --policy good.yaml
  redoubt attest web-1 --save-ima-allow files.txt  # what was measured so far is allowed
  redoubt attest web-1 --ima-allow files.txt --ima-known web-1.ima
  redoubt attest web-1 --out evidence/             # for tpm2_checkquote and tpm2_eventlog
  redoubt attest replay --event-log binary_bios_measurements`,
		Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.attest(c.Context(), args[0], o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.nonce, "nonce", "", "16 to 64 bytes in hexadecimal (default: random)")
	f.StringVar(&o.policy, "policy", "", "what is good (YAML)")
	f.StringVar(&o.ca, "ca", "", "CA certificate of the guest's host in PEM (default: this host's)")
	f.StringVar(&o.out, "out", "", "write the evidence to this directory")
	f.StringVar(&o.save, "save-policy", "", "write a policy that what is running now fulfils")
	f.StringVar(&o.guestLog, "guest-log", "", "event log that the guest's firmware wrote, where the host cannot read it (OVMF)")
	f.StringVar(&o.allow, "ima-allow", "", "what the guest may measure: lines as sha256sum writes them")
	f.StringVar(&o.known, "ima-known", "", "keep in this file what was vouched for of the IMA list, and go on from there")
	f.StringVar(&o.saveAllow, "save-ima-allow", "", "write what was measured so far as a file for --ima-allow")
	c.AddCommand(a.replayCommand())
	return c
}

// attestOptions are the flags of attest.
type attestOptions struct{ nonce, policy, ca, out, save, guestLog, allow, known, saveAllow string }

func (a *app) attest(ctx context.Context, name string, o attestOptions) error {
	nonce := make([]byte, 32)
	if o.nonce == "" {
		_, _ = rand.Read(nonce) // never fails (crypto/rand)
	} else {
		var err error
		if nonce, err = hex.DecodeString(o.nonce); err != nil || len(nonce) < 16 || len(nonce) > 64 {
			return usagef("--nonce: use 16 to 64 bytes in hexadecimal")
		}
	}
	caFile := o.ca
	if caFile == "" {
		caFile = filepath.Join(a.stateDir, "vtpm", vtpm.CAFile)
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return fmt.Errorf("attest: host's CA certificate: %w", err)
	}
	opt := attest.Options{Nonce: nonce, Roots: x509.NewCertPool()}
	if !opt.Roots.AppendCertsFromPEM(pem) {
		return usagef("--ca: %s: holds no certificate in PEM", caFile)
	}
	if o.policy != "" {
		b, err := os.ReadFile(o.policy)
		if err != nil {
			return usagef("--policy: %v", err)
		}
		if opt.Policy, err = attest.ParsePolicy(b); err != nil {
			return usagef("--policy: %s: %v", o.policy, err)
		}
	}
	if err := o.readIMA(&opt); err != nil {
		return err
	}
	c := a.client()
	get := func(list bool, after int) (*attest.Evidence, error) {
		a.progress("asking %s's vTPM for a quote", name)
		defer a.progressEnd()
		res, err := c.Quote(ctx, &v1.QuoteRequest{Name: name, Nonce: nonce, Ima: list, ImaAfter: uint32(after)})
		if err != nil {
			return nil, err
		}
		return attest.DecodeEvidence(bytes.NewReader(res.Evidence))
	}
	// A guest that measures nothing beside its boot needs no list to show that.
	list := opt.Known != nil || o.saveAllow != ""
	evidence, err := get(list, opt.Known.Known())
	if err == nil && !list && attest.NeedsIMA(evidence) {
		evidence, err = get(true, 0)
	}
	if err != nil {
		return err
	}
	if o.guestLog != "" {
		if evidence.GuestLog, err = os.ReadFile(o.guestLog); err != nil {
			return usagef("--guest-log: %v", err)
		}
	}
	opt.Activate = func(blob, secret []byte) ([]byte, error) {
		r, err := c.ActivateCredential(ctx, &v1.ActivateCredentialRequest{Name: name, CredentialBlob: blob, Secret: secret})
		if err != nil {
			return nil, fmt.Errorf("%s", a.explain(err))
		}
		return r.Secret, nil
	}
	report := attest.Verify(evidence, opt)
	if f := report.Failed(); f != nil && f.Name == attest.StepIMA && opt.Known.Known() > 0 {
		// What was known is not this list's, or was held against another allowlist: the whole list decides.
		log := evidence.GuestLog
		if evidence, err = get(true, 0); err != nil {
			return err
		}
		evidence.GuestLog, opt.Known = log, nil
		report = attest.Verify(evidence, opt)
	}
	if o.out != "" {
		if err := evidence.WriteDir(o.out); err != nil {
			return err
		}
	}
	if a.json {
		err = a.printJSON(report)
	} else {
		err = report.WriteText(a.out)
	}
	if err != nil {
		return err
	}
	if failed := report.Failed(); failed != nil {
		return exitError(1)
	}
	if err := o.saveIMA(evidence, report); err != nil {
		return err
	}
	if o.save != "" {
		return a.savePolicy(evidence, o.save)
	}
	return nil
}

// readIMA reads what is allowed and what is known of the guest's IMA list.
func (o *attestOptions) readIMA(opt *attest.Options) error {
	if o.allow != "" {
		b, err := os.ReadFile(o.allow)
		if err == nil {
			opt.Allow, err = ima.ParseAllowlist(b)
		}
		if err != nil {
			return usagef("--ima-allow: %s: %v", o.allow, err)
		}
	}
	if o.known == "" || o.saveAllow != "" { // which needs the whole list
		return nil
	}
	b, err := os.ReadFile(o.known)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		opt.Known = &attest.KnownIMA{}
		if err = json.Unmarshal(b, opt.Known); err == nil && (opt.Known.Count < 0 || opt.Known.Count > 1<<30) {
			err = fmt.Errorf("%d entries are known", opt.Known.Count)
		}
	}
	if err != nil {
		return usagef("--ima-known: %s: %v: remove it to begin anew", o.known, err)
	}
	return nil
}

// saveIMA keeps what a report vouches for.
func (o *attestOptions) saveIMA(e *attest.Evidence, r *attest.Report) error {
	if o.known != "" && r.IMA != nil {
		b, err := json.MarshalIndent(r.IMA, "", "  ")
		if err == nil {
			err = renameio.WriteFile(o.known, append(b, '\n'), 0o600)
		}
		if err != nil {
			return fmt.Errorf("--ima-known: %w", err)
		}
	}
	if o.saveAllow == "" {
		return nil
	}
	all, err := attest.VouchedIMA(e, r)
	if err != nil {
		return fmt.Errorf("--save-ima-allow: %w", err)
	}
	return os.WriteFile(o.saveAllow, ima.Allow(all), 0o644)
}

// savePolicy writes what the evidence shows, once that was verified, as the policy.
func (a *app) savePolicy(e *attest.Evidence, path string) error {
	p, err := attest.PolicyFrom(e)
	if err != nil {
		return err
	}
	b, err := p.Encode()
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}

func (a *app) replayCommand() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:     "replay --event-log FILE",
		Short:   "Print the PCRs that a TCG event log adds up to",
		Long:    "Reads any TCG event log (crypto-agile or SHA-1) and prints the PCR values that it adds up to.\nA damaged log is named with the offset; what was read before it is still printed.",
		Example: "  redoubt attest replay --event-log /sys/kernel/security/tpm0/binary_bios_measurements",
		Args:    names(0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			if path == "" {
				return usagef("attest replay: give --event-log FILE")
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return usagef("--event-log: %v", err)
			}
			r, damage := attest.ReplayReport(b)
			if r == nil {
				return fmt.Errorf("%s: %w", path, damage)
			}
			if a.json {
				err = r.WriteJSON(a.out)
			} else {
				err = r.WriteText(a.out)
			}
			if err == nil && damage != nil {
				err = fmt.Errorf("%s: %w", path, damage)
			}
			return err
		},
	}
	c.Flags().StringVar(&path, "event-log", "", "TCG event log")
	return c
}
