package vtpm

import (
	"context"
	"time"

	"github.com/google/go-tpm/tpm2"

	"redoubt.dev/redoubt/attest"
	"redoubt.dev/redoubt/ipc/rpc"
	"redoubt.dev/redoubt/services/protocol"
	"redoubt.dev/redoubt/vtpm/manager"
)

// quoteTime bounds a quote, which may have to wait for a new vTPM's keys.
const quoteTime = 20 * time.Second

// quote makes evidence: the whole SHA-256 bank, signed together with the verifier's nonce, and
// the log of what was measured.
func (s *service) quote(ctx context.Context, r *rpc.Request) (any, error) {
	var in protocol.Quote
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	g, device, err := s.running(in.UUID)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeout(ctx, quoteTime)
	defer stop()
	all := make([]uint, attest.PCRCount)
	for i := range all {
		all[i] = uint(i)
	}
	q, err := device.Quote(ctx, in.Nonce, manager.Selection(tpm2.TPMAlgSHA256, all...))
	if err != nil {
		return nil, err
	}
	e := attest.Evidence{
		Guest: in.Name, Quote: q.Attest, Signature: q.Signature,
		AK: q.AK, EKCertificate: q.EKCertificate, EKChain: q.Chain,
	}
	for _, p := range q.PCRs {
		e.PCRs = append(e.PCRs, p.Value)
	}
	g.mu.Lock()
	e.EventLog = g.log
	g.mu.Unlock()
	return protocol.Quoted{Evidence: e}, nil
}

// activate opens a credential, which proves that AK and EK live in this one vTPM.
func (s *service) activate(ctx context.Context, r *rpc.Request) (any, error) {
	var in protocol.Activate
	if err := r.Decode(&in); err != nil {
		return nil, err
	}
	_, device, err := s.running(in.UUID)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeout(ctx, quoteTime)
	defer stop()
	secret, err := device.Activate(ctx, in.CredentialBlob, in.Secret)
	if err != nil {
		return nil, err
	}
	return protocol.Activated{Secret: secret}, nil
}
